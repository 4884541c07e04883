"""Letters and numbers for SmolLM2 to put in order: solutions, prompts, validation and test in runs/reasoning/smollm2.

python recipes/smollm2/make.py            # says what to install; writes the whole model and the pruned one
python recipes/reasoning/smollm2/make.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

from letters import rows
from series import write_rows

FOLDER = Path("runs/reasoning/smollm2")
SIZES = {"solutions": 4000, "validation": 64, "test": 256, "prompts": 2000}  # each drawn with a seed of its own
LEARNED = "solutions"  # by the teacher; elsewhere only it writes completions


def main() -> None:
    for seed, (name, size) in enumerate(SIZES.items()):
        drawn = rows(size, seed)
        if name != LEARNED:
            drawn = ({key: row[key] for key in ("prompt", "answer")} for row in drawn)
        write_rows(FOLDER / f"{name}.jsonl", drawn)


if __name__ == "__main__":
    main()
