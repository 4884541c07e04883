"""The table of recipes/feedback: what rewards, SDPO and RLSD learn, and what of it the teacher brought."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from bench.lib.markdown import each, table
from bench.lib.report import read_recipe

SHARES = ("sibling", "masked", "fallback")
Run = dict[str, Any]


def compared() -> str:
    """Of each config and control the means of its seeds, and what each of them solves."""
    report = read_recipe("feedback/comparison")
    arms: dict[str, list[Run]] = {}
    for run in report["runs"]:
        control = f", `loss.control: {run['control']}`" if run["control"] else ""
        arms.setdefault(f"`{run['config']}.yaml`{control}", []).append(run)
    header = ["run", "accuracy after", "seeds", " / ".join(SHARES), "FLOPs"]
    (before,) = {f"{run['accuracy'][0]:.1%}" for run in report["runs"]}
    conditions = f"All begin at {before}; greedy answers to 550 held-out problems, ± 2 points each; means of the seeds"
    rows = [[name, *_cells(runs)] for name, runs in arms.items()]
    return table(header, rows, conditions, [report], "torch", "transformers")


def _cells(runs: list[Run]) -> Iterator[str]:
    after = [run["accuracy"][-1] for run in runs]
    yield f"{fmean(after):.1%}"
    yield each(after, ".1%")
    yield " / ".join(f"{fmean(run[share] for run in runs):.2f}" for share in SHARES if share in runs[0])
    yield f"{fmean(run['flops'] for run in runs):.1e}"


TABLES = {"feedback": compared}
