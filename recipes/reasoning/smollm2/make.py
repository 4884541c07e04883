"""Sums in words for SmolLM2: runs/reasoning/smollm2/prompts.jsonl, validation.jsonl and test.jsonl.

python recipes/smollm2/make.py            # says what to install; writes teacher and student
python recipes/reasoning/smollm2/make.py
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from series import write_rows

FOLDER = Path("runs/reasoning/smollm2")
LARGEST = 32
SIZES = {"test": 128, "validation": 64}  # the others are learned from


def main() -> None:
    pairs = list(itertools.product(range(1, LARGEST + 1), repeat=2))
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"What is {first} + {second}?", "answer": str(first + second)} for first, second in pairs]
    for name, size in SIZES.items():
        write_rows(FOLDER / f"{name}.jsonl", rows[:size])
        rows = rows[size:]
    write_rows(FOLDER / "prompts.jsonl", rows)


if __name__ == "__main__":
    main()
