"""The tables of recipes/self_distillation: what a model obeys, learns to do without its context, and forgets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.lib.markdown import Report, table

RECIPE = Path(__file__).parents[2] / "recipes" / "self_distillation"
Run = dict[str, Any]
COLUMNS = {
    "does": ("{}", ".0%"),
    "novel_perplexity": ("perplexity, novel", ".1f"),
    "solutions_perplexity": ("perplexity, solutions", ".2f"),
    "capitals": ("capitals", ".0%"),
    "flops": ("FLOPs", ".1e"),
}


def learned(part: str, does: str) -> str:
    """Of each arm the means of its seeds, and what each of them does."""
    report = _read(part)
    arms: dict[str, list[Run]] = {}
    for run in report["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    rows = [[f"`{arm}`", *_cells(runs)] for arm, runs in arms.items()]
    header = ["", *(title.format(does) for title, _ in COLUMNS.values()), "teacher_kl, first and last step"]
    (answers,) = {run["answers"] for run in report["runs"]}
    conditions = f"{answers} greedy answers of each run; of several seeds the means, and in brackets each"
    return table(header, rows, conditions, [report], "torch", "transformers")


TABLES: dict[str, Callable[[], str]] = {
    "self-distillation-rule": partial(learned, "rule", "obeys"),
    "self-distillation-examples": partial(learned, "examples", "right"),
}


def _read(name: str) -> Report:
    report: Report = json.loads((RECIPE / f"{name}.json").read_text(encoding="utf-8"))
    return report


def _cells(runs: list[Run]) -> Iterator[str]:
    for name, (_, form) in COLUMNS.items():
        values = [run[name] for run in runs if name in run]
        each = f" ({', '.join(f'{value:{form}}' for value in values)})" if name == "does" and len(values) > 1 else ""
        yield f"{fmean(values):{form}}{each}" if values else "–"
    steps = [run["teacher_kl"] for run in runs if run.get("teacher_kl")]
    yield ", ".join(f"{fmean(values):.2f}" for values in zip(*steps, strict=True)) or "–"
