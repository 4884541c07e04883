"""Rewards, SDPO and RLSD from one student, at equal samples, with the controls that tell whether the teacher mattered.

    python recipes/feedback/compare.py              # three seeds
    python recipes/feedback/compare.py 0            # these seeds

All runs are in one process, since each is short. What is complete is not run again, what was interrupted goes on. The
result is runs/feedback/comparison.json, and a table.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

# Models this small leave nothing for a second thread to do.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import make

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
    ("sdpo", None),
)
SHARES = ("sibling", "masked", "fallback")


def main() -> None:
    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    make.main()
    if not (RUNS / "student" / "student").is_dir():
        sft(parse(["sft", str(HERE / "student.yaml")])[1])
    result = {}
    for seed, (name, control) in itertools.product(seeds, ARMS):
        result[f"{name} {control or '-'} {seed}"] = arm(name, control, seed)
        (RUNS / "comparison.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def arm(name: str, control: str | None, seed: int) -> dict[str, Any]:
    config = parse(words(name, control, seed))[1]
    run = Path(config.run)
    if not (run / "student").is_dir():
        distill(config)
    rows = read_jsonl(run / "metrics.jsonl")
    found: dict[str, Any] = {"accuracy": [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]}
    found["flops"] = sum(value for row in rows for key, value in row.items() if key.startswith("flops/"))
    found["reward"] = statistics.mean(row["reward/mean"] for row in rows[-5:])
    for share in SHARES:
        values = [row[key] for row in rows if (key := f"context/{share}_fraction") in row]
        found |= {share: statistics.mean(values)} if values else {}
    return found


def words(name: str, control: str | None, seed: int) -> list[str]:
    """The command line of an arm."""
    run = RUNS / f"{name}{f'_{control}' if control else ''}-{seed}"
    controlled = [f"--loss.control={control}"] if control else []
    return ["distill", str(HERE / f"{name}.yaml"), f"--run={run}", f"--seed={seed}", *controlled]


def table(result: dict[str, dict[str, Any]]) -> str:
    """Of each arm, the mean of its seeds and each of them."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for name, found in result.items():
        arms.setdefault(name.rpartition(" ")[0], []).append(found)
    lines = []
    for name, all_found in arms.items():
        after = [found["accuracy"][-1] for found in all_found]
        each = ", ".join(f"{value:.1%}" for value in after)
        shares = " ".join(
            f"{share} {statistics.mean(f[share] for f in all_found):.2f}" for share in SHARES if share in all_found[0]
        )
        flops = statistics.mean(found["flops"] for found in all_found)
        lines.append(f"{name:26} {statistics.mean(after):6.1%}  ({each})  {flops:.1e} FLOPs  {shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
