"""A second task for the demo's tokenizer: five digits in ascending order, written as one number.

    python recipes/several/digits.py        # after recipes/demo/run.py, which makes the sums and their teacher

Writes into runs/several/data: sorting.jsonl and sorting-heldout.jsonl, and both.jsonl and both-heldout.jsonl, which hold
the demo's sums too.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

DEMO, FOLDER = Path("runs/demo/data"), Path("runs/several/data")
TRAIN, HELD_OUT = 3000, 300


def main() -> None:
    rows = sorting(TRAIN + HELD_OUT)
    train, heldout = rows[HELD_OUT:], rows[:HELD_OUT]
    _write("sorting", train)
    _write("sorting-heldout", heldout)
    _write("both", train + _demo("train")[:TRAIN])
    _write("both-heldout", heldout + _demo("heldout")[:HELD_OUT])


def sorting(count: int) -> list[dict[str, str]]:
    """Different problems "3 1 8 5 1 =" with the answer "11358". No digit is 0: a number does not begin with one."""
    rng, problems = random.Random(0), dict[str, str]()
    while len(problems) < count:
        digits = [rng.choice("123456789") for _ in range(5)]
        problems[" ".join(digits) + " ="] = "".join(sorted(digits))
    return [{"prompt": text, "completion": answer, "answer": answer} for text, answer in problems.items()]


def _demo(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _write(name: str, rows: Sequence[dict[str, str]]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
