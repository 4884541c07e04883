"""Sums and differences for SmolLM2: runs/reasoning/smollm2/prompts.jsonl, validation.jsonl and test.jsonl.

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
LARGEST = 20
SIZES = {"test": 128, "validation": 64}  # the others are learned from


def main() -> None:
    numbers = range(1, LARGEST + 1)
    sums = list(itertools.product(numbers, "+-", numbers))
    random.Random(0).shuffle(sums)
    rows = [
        {"prompt": f"What is {a} {sign} {b}?", "answer": str(a + b if sign == "+" else a - b)} for a, sign, b in sums
    ]
    for name, size in SIZES.items():
        write_rows(FOLDER / f"{name}.jsonl", rows[:size])
        rows = rows[size:]
    write_rows(FOLDER / "prompts.jsonl", rows)


if __name__ == "__main__":
    main()
