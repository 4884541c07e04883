"""Rewards, SDPO and RLSD from one student, at equal samples, with the controls that tell whether the teacher mattered.

    python recipes/feedback/compare.py              # three seeds
    python recipes/feedback/compare.py 0            # these seeds

All runs are in one process, since each is short. What is complete is not run again, what was interrupted goes on. The
result is runs/feedback/comparison.json; the README's table is made of the copy beside it.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from pathlib import Path
from typing import Any

# Models this small leave nothing for a second thread to do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1]))

import make
from series import total_flops, write_report

from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.distill import distill
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.sft import sft

HERE, RUNS = Path(__file__).parent, Path("runs/feedback")
ARMS = (  # a config of this folder, and the control
    ("rl", None),
    ("sdpo_sampled", None),
    ("rlsd", None),
    ("sdpo_sampled", "shuffled"),
    ("sdpo_sampled", "no_teacher"),
    ("rlsd", "shuffled"),
    ("rlsd", "no_teacher"),
    ("sdpo", None),
    ("sdpo", "shuffled"),
)
SHARES = ("sibling", "masked", "fallback")


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    make.main()
    if not (RUNS / "student" / "student").is_dir():
        sft(parse(["sft", str(HERE / "student.yaml")])[1])
    found = []
    for seed, (name, control) in itertools.product(seeds, ARMS):
        found.append(arm(name, control, seed))
        write_report(RUNS / "comparison.json", found)
        print(found[-1], flush=True)


def arm(name: str, control: str | None, seed: int) -> dict[str, Any]:
    config = parse(words(name, control, seed))[1]
    run = Path(config.run)
    if not (run / "student").is_dir():
        distill(config)
    rows = read_jsonl(run / "metrics.jsonl")
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    found = {"config": name, "control": control, "seed": seed, "accuracy": accuracy, "flops": total_flops(run)}
    for share in SHARES:
        values = [row[key] for row in rows if (key := f"context/{share}_fraction") in row]
        found |= {share: statistics.mean(values)} if values else {}
    return found


def words(name: str, control: str | None, seed: int) -> list[str]:
    """The command line of an arm."""
    run = RUNS / f"{name}{f'_{control}' if control else ''}-{seed}"
    controlled = [f"--loss.control={control}"] if control else []
    return ["distill", str(HERE / f"{name}.yaml"), f"--run={run}", f"--seed={seed}", *controlled]


if __name__ == "__main__":
    main()
