"""A figure for each setting: accuracy against FLOPs, and against how many prompts there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from arms import ARMS, SETTINGS
from series import Row

# Colours of Okabe and Ito, told apart with any colour vision.
COLOURS = dict(zip(ARMS, ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
LINES = ("-", "--", ":")  # the fewest prompts, all, those between
FLOPS = (1e10, 2e12)
ACCURACIES = {"greedy": "accuracy, greedy", "sampled": "accuracy, T = 1"}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """SETTING.png for each setting of which something has run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for setting in SETTINGS:
        own = [row for row in rows if row["setting"] == setting]
        shown = [row for row in own if row["arm"] in ARMS and row["chosen"] and "test" in row]
        if not shown:
            continue
        figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), sharex="col", sharey="row", layout="constrained")
        for line, (name, label) in zip(axes, ACCURACIES.items(), strict=True):
            line[0].set(ylabel=label, ylim=(0, 1.03))
            for axis in line:
                _levels(axis, own, name)
            _against_flops(line[0], shown, name)
            _against_prompts(line[1], shown, name)
        axes[1][0].set(xscale="log", xlabel="FLOPs", xlim=FLOPS)
        axes[1][1].set(xscale="log", xlabel="prompts")
        axes[1][1].set_xticks(amounts := sorted({row["prompts"] for row in shown}), [f"{n:,}" for n in amounts])
        for axis in axes[1]:
            axis.xaxis.set_minor_formatter("")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        figure.suptitle(f"{setting}: {SETTINGS[setting].title}", fontsize="medium")
        figure.savefig(folder / f"{setting}.png", dpi=100)
        pyplot.close(figure)


def _levels(axis: Any, rows: Sequence[Row], name: str) -> None:
    for arm, style in (("teacher", "-."), ("start", (0, (1, 3)))):
        value = fmean(row["test"][name] for row in rows if row["arm"] == arm)
        axis.axhline(value, color="#999999", linestyle=style, linewidth=1, label=arm if arm == "teacher" else "before")


def _against_flops(axis: Any, rows: Sequence[Row], name: str) -> None:
    """A line for each arm and number of prompts: means of the seeds."""
    for arm in ARMS:
        amounts = sorted({row["prompts"] for row in rows if row["arm"] == arm})
        for prompts, style in zip(
            amounts, (LINES[0], *reversed(LINES[1:])) if len(amounts) > 2 else LINES, strict=False
        ):
            runs = [row for row in rows if (row["arm"], row["prompts"]) == (arm, prompts)]
            flops = [fmean(values) for values in zip(*(run["flops"] for run in runs), strict=True)]
            values = [fmean(values) for values in zip(*(run["test"][name] for run in runs), strict=True)]
            axis.plot(flops, values, color=COLOURS[arm], linestyle=style, label=f"{ARMS[arm].label}, {prompts}")


def _against_prompts(axis: Any, rows: Sequence[Row], name: str) -> None:
    """The checkpoint that the validation problems choose, with standard errors of the seeds."""
    for arm in ARMS:
        points = []
        for prompts in sorted({row["prompts"] for row in rows if row["arm"] == arm}):
            runs = [row for row in rows if (row["arm"], row["prompts"]) == (arm, prompts)]
            values = [run["test"][name][run["best"]] for run in runs]
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            points.append((prompts, fmean(values), error))
        if points:
            axis.errorbar(*zip(*points, strict=True), color=COLOURS[arm], marker="o", markersize=4, capsize=2)
