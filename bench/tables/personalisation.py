"""The tables of recipes/personalisation: what a model knows of a company and how it does as it is told, by phase."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from bench.lib.markdown import Report, means, table
from bench.lib.report import counted, read_recipe

REPORT = "personalisation/results"
Run = dict[str, Any]
CONTROLS = ("_shuffled", "_no_teacher")
COLUMNS: dict[str, tuple[Callable[[Run], float | None], str]] = {
    "knows the first set": (lambda run: run["knows"]["first"], ".0%"),
    "the second set": (lambda run: run["knows"]["second"], ".0%"),
    "follows": (lambda run: run["follows"], ".0%"),
    "words": (lambda run: run["words"], ".0f"),
    "FLOPs": (lambda run: run.get("flops"), ".1e"),
}


def phases() -> str:
    """Of each phase the mean of its seeds, and in brackets each of them."""
    report = read_recipe(REPORT)
    rows = [[f"`{phase}`", *(_cell(runs, *column) for column in COLUMNS.values())] for phase, runs in _phases(report)]
    read = next(run["reads"] for run in report["runs"] if "reads" in run)
    rows.insert(1, ["… with the document before the question", f"{read:.0%}", *["–"] * (len(COLUMNS) - 1)])
    return table(["", *COLUMNS], rows, f"{_seeds(report)}, in brackets each", [report], "torch", "transformers")


def kinds() -> str:
    """Of each kind of instructions the share that is met, after some phases."""
    report = read_recipe(REPORT)
    found = {phase: runs for phase, runs in _phases(report) if not phase.endswith(CONTROLS)}
    rows = [
        [f"`{kind}`", *(f"{fmean(run['follows_by_kind'][kind] for run in runs):.0%}" for runs in found.values())]
        for kind in found["before"][0]["follows_by_kind"]
    ]
    header = ["", *(f"`{phase}`" for phase in found)]
    return table(header, rows, _seeds(report), [report], "torch", "transformers")


TABLES = {"personalisation": phases, "personalisation-kinds": kinds}


def _phases(report: Report) -> list[tuple[str, list[Run]]]:
    names = dict.fromkeys(run["phase"] for run in report["runs"])
    return [(name, [run for run in report["runs"] if run["phase"] == name]) for name in names]


def _seeds(report: Report) -> str:
    return f"Means of {counted(max(len(runs) for _, runs in _phases(report)), 'seed')} at most"


def _cell(runs: list[Run], value: Callable[[Run], float | None], form: str) -> str:
    values = [found for run in runs if (found := value(run)) is not None]
    if not values:
        return ""
    return means(values if "%" in form else [fmean(values)], form)
