"""Numbers for SmolLM2 to repeat: runs/reasoning/smollm2/prompts.jsonl, validation.jsonl and test.jsonl.

The second is there to choose rates with. None of the configs here reads it: they have one rate each.

python recipes/smollm2/make.py            # says what to install; writes teacher and student
python recipes/reasoning/smollm2/make.py
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from series import write_rows

FOLDER = Path("runs/reasoning/smollm2")
NUMBERS = range(100, 1000)
SIZES = {"test": 128, "validation": 48}  # the others are learned from


def main() -> None:
    numbers = random.Random(0).sample(NUMBERS, len(NUMBERS))
    rows = [{"prompt": f"Repeat the number {number}.", "answer": str(number)} for number in numbers]
    for name, size in SIZES.items():
        write_rows(FOLDER / f"{name}.jsonl", rows[:size])
        rows = rows[size:]
    write_rows(FOLDER / "prompts.jsonl", rows)


if __name__ == "__main__":
    main()
