"""The tables of recipes/objectives: how far each objective brings a student, by its learning rate and its batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.lib.markdown import markdown, table, with_error
from bench.lib.report import read_recipe

OBJECTIVES = {
    "sampled": "`policy_gradient`",
    "sampled_baseline": "… `baseline: mean`",
    "sampled_power": "… `advantage_power: 1`",
    "bucket": "`top_k`, `bucket`",
    "half_tail": "… `sampled`, `tail_weight: 0.5`",
    "tail": "… `sampled`",
    "whole": "`reverse_kl`",
}
Run = dict[str, Any]


def trained() -> str:
    """Accuracy and teacher_kl at the end of training, with the standard errors of the seeds."""
    report = read_recipe("objectives/tiny")
    shown = [run for run in report["runs"] if run["seed"]]
    sizes = sorted({run["tokens"] for run in shown})
    rows = []
    for name, label in OBJECTIVES.items():
        cells = []
        for size in sizes:
            runs = [run for run in shown if (run["objective"], run["tokens"]) == (name, size)]
            cells += (
                [f"{runs[0]['rate']:g}", _percent(runs), with_error([run["teacher_kl"] for run in runs], ".2f")]
                if runs
                else [""] * 3
            )
        rows.append([label, *cells])
    header = ["", *(f"{what} at {size:,}" for size in sizes for what in ("rate", "accuracy, %", "teacher_kl"))]
    counts = []
    for size in sizes:
        seeds = {run["seed"] for run in shown if run["tokens"] == size}
        counts.append(f"{len(seeds)} at {size:,}")
    return table(header, rows, f"± standard errors. Seeds: {', '.join(counts)} tokens", [report])


def learning_rates() -> str:
    """Accuracy at each learning rate that was tried, of one seed."""
    report = read_recipe("objectives/tiny")
    sizes = sorted({run["tokens"] for run in report["runs"]})
    rates = sorted({run["rate"] for run in report["runs"]})
    rows = []
    for name, label in OBJECTIVES.items():
        found = {
            (run["tokens"], run["rate"]): [run]
            for run in report["runs"]
            if run["objective"] == name and not run["seed"]
        }
        cells = (" / ".join(_percent(found.get((size, rate), ())) for rate in rates) for size in sizes)
        rows.append([label, *("" if not cell.strip("/– ") else cell for cell in cells)])
    header = [f"accuracy, %, at {' / '.join(f'{rate:g}' for rate in rates)}", *(f"{size:,} tokens" for size in sizes)]
    return markdown(header, rows)


def healing() -> str:
    """teacher_kl of SmolLM2's last steps at each learning rate that was tried, of one seed."""
    report = read_recipe("objectives/smollm2")
    rates = sorted({run["rate"] for run in report["runs"]})
    found = {(run["objective"], run["rate"]): run["teacher_kl"] for run in report["runs"] if not run["seed"]}
    rows = [
        [label, *(f"{found[name, rate]:.2f}" if (name, rate) in found else "–" for rate in rates)]
        for name, label in OBJECTIVES.items()
    ]
    return table(["teacher_kl at", *(f"{rate:g}" for rate in rates)], rows, "One seed", [report])


TABLES = {"objectives-trained": trained, "objectives-rates": learning_rates, "objectives-healing": healing}


def _percent(runs: Iterable[Run]) -> str:
    """The mean accuracy of the runs in per cent, with its standard error; – for no run."""
    values = [100 * run["accuracy"] for run in runs]
    return with_error(values, ".1f") if values else "–"
