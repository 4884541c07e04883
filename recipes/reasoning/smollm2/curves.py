"""Accuracy of SmolLM2's arms against FLOPs: at each evaluation, on the validation problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from series import Row

# Colours of Okabe and Ito, those of the arms in recipes/reasoning/figure.py.
COLOURS = {"sft": "#000000", "sampled": "#D55E00", "whole": "#0072B2"}
PANELS = {"sampled": "accuracy, T = 1", "greedy": "accuracy, greedy"}


def draw(rows: Sequence[Row], path: Path, labels: Mapping[str, str]) -> None:
    """A line for each run: those at the chosen rate with standard errors, the others thin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [row for row in rows if "curve" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharex=True, sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, PANELS.items(), strict=True):
        axis.set(xlabel="FLOPs", ylabel=label, ylim=(0, 1.03))
        for run in sorted(runs, key=lambda run: run["chosen"]):
            flops, values, errors = ([point[key] for point in run["curve"]] for key in ("flops", name, f"{name}_se"))
            own = {"color": COLOURS[run["arm"]]}
            if run["chosen"]:
                text = f"{labels[run['arm']]}, {run['rate']:g}" if not run["seed"] else None
                axis.errorbar(flops, values, errors, **own, marker="o", markersize=4, capsize=2, label=text)
            else:
                axis.plot(flops, values, **own, linewidth=0.7, alpha=0.5)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("H with SmolLM2-135M: half-trained on the teacher's transcripts", fontsize="medium")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
