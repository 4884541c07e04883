"""What the recipe's student reads: careless solutions, and how to use one that stands in the prompt.

    python recipes/feedback/make.py

Sums of three digits, as in the demo. The rows are of two kinds: a problem with a careless solution, and a problem that is
followed by its right solution, which is then the answer. So the student knows two things: what to write is uncertain, and a
solution that it is shown can be relied on. held-out problems of the second kind tell whether it reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE, DATA = Path(__file__).parent, Path("runs/feedback/data")
sys.path.insert(0, str(HERE.parent / "demo"))

from arithmetic import HELD_OUT, write_data, write_model  # noqa: E402
from making import write_rows  # noqa: E402

TOLD = "{prompt}\n{text}"  # what teacher.context.sibling writes in sdpo.yaml


def main() -> None:
    if (DATA / "done").exists():
        return
    write_data(DATA)
    right, sloppy = (read(DATA / f"{name}.jsonl") for name in ("train", "sloppy"))
    told = [row | {"prompt": TOLD.format(prompt=row["prompt"], text=row["completion"])} for row in right]
    held, told = told[:HELD_OUT], told[HELD_OUT:]
    write_rows(DATA / "told_heldout.jsonl", ({"prompt": row["prompt"], "answer": row["answer"]} for row in held))
    copies = round(len(sloppy) / len(told))
    kept = ({name: row[name] for name in ("prompt", "completion")} for row in [*sloppy, *(told * copies)])
    write_rows(DATA / "student.jsonl", kept)
    write_model(DATA / "student", layers=2)
    (DATA / "done").touch()


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
