"""The tables of recipes/self_distillation: what a context does, what a model learns to do without it, and forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

from bench.lib.markdown import means, table
from bench.lib.report import read_recipe

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
    report = read_recipe(f"self_distillation/{part}")
    arms: dict[str, list[Run]] = {}
    for run in report["runs"]:
        arms.setdefault(run["arm"], []).append(run)
    rows = [[f"`{arm}`", *_cells(runs)] for arm, runs in arms.items()]
    header = ["", *(title.format(does) for title, _ in COLUMNS.values()), "teacher_kl, first and last step"]
    (answers,) = {run["answers"] for run in report["runs"]}
    conditions = f"{answers} greedy answers of each run; of several seeds the means, and in brackets each"
    return table(header, rows, conditions, [report], "torch", "transformers")


def rules() -> str:
    """Of each rule, the share of answers that obey it: none where no answer does."""
    report = read_recipe("self_distillation/probe")
    runs = [run for run in report["runs"] if "rule" in run]
    rows = [
        [run["rule"], f"{run['without']:.0%}", f"{run['with']:.0%}"] for run in runs if run["with"] or run["without"]
    ]
    none = ", ".join(run["rule"] for run in runs if not run["with"] and not run["without"])
    conditions = f"{runs[0]['answers']} answers each. Obeyed by no answer: {none}"
    return table(["rule", "without it", "in the system prompt"], rows, conditions, [report], "torch", "transformers")


def tasks() -> str:
    """Of each task, the share of right answers by the number of examples."""
    report = read_recipe("self_distillation/probe")
    right: dict[str, dict[int, float]] = {}
    for run in report["runs"]:
        if "task" in run:
            right.setdefault(run["task"], {})[run["examples"]] = run["right"]
    shown = sorted(next(iter(right.values())))
    rows = [[task, *(f"{by_count[count]:.0%}" for count in shown)] for task, by_count in right.items()]
    answers = max(run["answers"] for run in report["runs"])
    header = ["task", *(f"{count} examples" for count in shown)]
    return table(header, rows, f"{answers} words each", [report], "torch", "transformers")


TABLES: dict[str, Callable[[], str]] = {
    "self-distillation-rules": rules,
    "self-distillation-tasks": tasks,
    "self-distillation-rule": partial(learned, "rule", "obeys"),
    "self-distillation-examples": partial(learned, "examples", "right"),
}


def _cells(runs: list[Run]) -> Iterator[str]:
    for name, (_, form) in COLUMNS.items():
        values = [run[name] for run in runs if name in run]
        shown = values if name == "does" else values and [fmean(values)]
        yield means(shown, form) if shown else "–"
    steps = [run["teacher_kl"] for run in runs if run.get("teacher_kl")]
    yield ", ".join(f"{fmean(values):.2f}" for values in zip(*steps, strict=True)) or "–"
