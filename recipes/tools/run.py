"""The tools recipe, on the CPU in a few minutes: a student that mostly guesses products learns to ask a calculator.

Two tiny Llamas are fine-tuned (`teacher.yaml`, `student.yaml`), then `distill.yaml` runs: the student samples, the
calculator answers when it is asked, the teacher scores the student's own tokens. Everything is kept in runs/tools.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUN = Path("runs/tools")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}  # models this small leave nothing for a second


def main() -> None:
    if not (RUN / "data").is_dir():
        _python(str(HERE / "make.py"), str(RUN / "data"))
    for command, stage in (("sft", "teacher"), ("sft", "student"), ("distill", "distill")):
        _python("-m", "fastkl.cli", command, str(HERE / f"{stage}.yaml"))
    rows = [json.loads(line) for line in (RUN / "distill" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "eval/accuracy" in row:
            print(f"after step {row['step']}: {row['eval/accuracy']:.1%} of held-out products right")


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, check=True)


if __name__ == "__main__":
    main()
