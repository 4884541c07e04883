"""Curves of accuracy and teacher_kl, of the seeds that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

# Colours of Okabe and Ito, told apart with any colour vision.
STYLES = {
    "sampled": ("sampled tokens", "#D55E00"),
    "sampled_baseline": ("… less the mean", "#E69F00"),
    "sampled_power": ("… power 1", "#CC79A7"),
    "bucket": ("top-k, bucket", "#56B4E9"),
    "half_tail": ("top-k, sampled tail, ½", "#0072B2"),
    "tail": ("top-k, sampled tail", "#009E73"),
    "whole": ("whole vocabulary", "#000000"),
}
QUANTITIES = {"accuracy": "held-out accuracy", "teacher_kl": "teacher_kl, nats per token"}
WINDOW = 5  # steps of teacher_kl that a point of its curve is the mean of


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each batch size; a curve is the mean of the seeds, with their standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [run for run in runs if run["seed"]]
    sizes = sorted({run["tokens"] for run in shown})
    if not sizes:
        return
    figure, axes = pyplot.subplots(
        2, len(sizes), figsize=(4 * len(sizes), 6), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for column, size in zip(axes.T, sizes, strict=True):
        for axis, (quantity, label) in zip(column, QUANTITIES.items(), strict=True):
            for name, (title, colour) in STYLES.items():
                curves = [_curve(run, quantity) for run in shown if (run["objective"], run["tokens"]) == (name, size)]
                if curves and curves[0]:
                    axis.errorbar(*_mean(curves), label=title, color=colour, marker=".", capsize=2)
            axis.set(ylabel=label if size == sizes[0] else None)
        column[0].set_title(f"{size:,} tokens per optimizer step")
        column[1].set_xlabel("step")
    for axis in axes[:, 0]:  # once all is drawn: a limit ends scaling
        axis.set_ylim(bottom=0)
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(sizes), frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(run: dict[str, Any], quantity: str) -> dict[int, float]:
    """The quantity by step; teacher_kl as means of some steps."""
    values = {int(step): value for step, value in run["curves"][quantity].items()}
    if quantity == "accuracy":
        return values
    steps = sorted(values)
    windows = (steps[start : start + WINDOW] for start in range(0, len(steps), WINDOW))
    return {window[-1]: fmean(values[step] for step in window) for window in windows}


def _mean(curves: Sequence[dict[int, float]]) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and standard errors over the seeds."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    errors = [stdev(row) / len(row) ** 0.5 if len(row) > 1 else 0.0 for row in values]
    return steps, [fmean(row) for row in values], errors
