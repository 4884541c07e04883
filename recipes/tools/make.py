"""Data and untrained models of the tools recipe: products of two numbers, with a calculator at hand.

The teacher's completions ask the calculator. The student's mostly guess; some ask it, and half of those mistype a digit.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from making import make_tokenizer, write_llama, write_rows

PIECES = ["<calc>", "</calc>", " = ", *"0123456789*="]
HELD_OUT = 500
ASKS = 0.25  # of the student's completions
COPIES = 3


def make(folder: Path) -> None:
    rng = random.Random(0)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    rng.shuffle(pairs)
    heldout, train = pairs[:HELD_OUT], pairs[HELD_OUT:]
    write_rows(folder / "heldout.jsonl", ({"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in heldout))
    write_rows(folder / "careful.jsonl", ({"prompt": f"{a}*{b}=", "completion": _asked(a, b)} for a, b in train))
    careless = [(a, b, _careless(a, b, rng)) for _ in range(COPIES) for a, b in train]
    write_rows(folder / "careless.jsonl", ({"prompt": f"{a}*{b}=", "completion": text} for a, b, text in careless))
    for name in ("teacher", "student"):
        write_llama(folder / name, make_tokenizer(PIECES, r"<[^>]*>| = |."), width=64, layers=2)


def _careless(a: int, b: int, rng: random.Random) -> str:
    if rng.random() > ASKS:
        return str(rng.randrange(100, 10_000))
    return _asked(a + rng.randrange(1, 10) if rng.random() < 0.5 else a, b)


def _asked(a: int, b: int) -> str:
    """What stands in a conversation: the question to the calculator, and its answer."""
    return f"<calc>{a}*{b}</calc> = {a * b}"


if __name__ == "__main__":
    make(Path(sys.argv[1]))
