"""The table of recipes/tokenizers: what a teacher with another tokenizer teaches."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from bench.lib.markdown import each, table
from bench.lib.report import read_recipe

ARMS = {
    "own": "teacher with the other tokenizer",
    "same": "teacher with the same tokenizer",
    "sft": "fine-tuned on the other teacher's text",
}
Run = dict[str, Any]


def compared() -> str:
    """Of each student and arm the mean of its seeds, and what each of them solves."""
    report = read_recipe("tokenizers/comparison")
    arms: dict[tuple[str, str], list[Run]] = {}
    for run in report["runs"]:
        arms.setdefault((run["student"], run["arm"]), []).append(run)
    header = ["student's tokens", "learns from", "before", "after", "seeds", "tokens of a segment", "FLOPs"]
    rows = [[student, ARMS[arm], *_cells(runs)] for (student, arm), runs in arms.items()]
    said = "Greedy answers to 550 held-out problems, ± 2 points each; means of the seeds"
    return table(header, rows, said, [report], "torch", "transformers")


def _cells(runs: list[Run]) -> Iterator[str]:
    after = [run["accuracy"][-1] for run in runs]
    yield f"{runs[0]['accuracy'][0]:.1%}"
    yield f"{fmean(after):.1%}"
    yield each(after, ".1%")
    names = ("alignment/segment_tokens", "alignment/teacher_segment_tokens")
    yield " / ".join(f"{fmean(run[name] for run in runs):.2f}" for name in names if name in runs[0])
    yield f"{fmean(run['flops'] for run in runs):.1e}"


TABLES = {"tokenizers": compared}
