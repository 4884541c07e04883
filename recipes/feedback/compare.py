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

# Models this small leave nothing for a second thread to do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).parents[1]))

import make
from series import Row, accuracies, run_here, total_flops, write_report

from fastkl.trainer.runs.files import read_jsonl

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
    run_here("sft", HERE / "student.yaml", RUNS / "student", {})
    found = []
    for seed, (name, control) in itertools.product(seeds, ARMS):
        found.append(arm(name, control, seed))
        write_report(RUNS / "comparison.json", found)
        print(found[-1], flush=True)


def arm(name: str, control: str | None, seed: int) -> Row:
    run = folder(name, control, seed)
    run_here("distill", HERE / f"{name}.yaml", run, settings(control, seed))
    rows = read_jsonl(run / "metrics.jsonl")
    found = {"config": name, "control": control, "seed": seed, "accuracy": accuracies(run), "flops": total_flops(run)}
    for share in SHARES:
        values = [row[key] for row in rows if (key := f"context/{share}_fraction") in row]
        found |= {share: statistics.mean(values)} if values else {}
    return found


def folder(name: str, control: str | None, seed: int) -> Path:
    return RUNS / f"{name}{f'_{control}' if control else ''}-{seed}"


def settings(control: str | None, seed: int) -> Row:
    """What differs from the arm's config."""
    return {"seed": seed, **({"loss.control": control} if control else {})}


if __name__ == "__main__":
    main()
