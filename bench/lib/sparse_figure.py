"""Kept columns of the sparse backward against the error of its gradients, from reports of `python -m bench sparse`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def draw_sparse(reports: Sequence[Report], file: Path, colours: Sequence[str], markers: Sequence[str]) -> Path:
    """A line for each kind of rows and size of a block; the points are the settings of error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 4.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    lines = [(i, report, j, block) for i, report in enumerate(reports) for j, block in enumerate(_blocks(report))]
    for i, report, j, block in lines:
        rows = sorted(
            (row for row in report["rows"] if row["block"] == block and row["threshold"] is None),
            key=lambda r: r["kept"],
        )
        for panel, gradient in zip(panels, ("hidden", "weight"), strict=True):
            style = {"color": colours[i % len(colours)], "marker": markers[i % len(markers)], "markersize": 4}
            kept, errors = [100 * row["kept"] for row in rows], [row[gradient] for row in rows]
            label = f"{_label(report)}, blocks of {block}"
            panel.plot(kept, errors, label=label, linestyle=("-", "--", ":")[j % 3], **style)
    for panel, gradient in zip(panels, ("hidden states", "weight"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="columns kept, %", title=f"gradient of the {gradient}")
        panel.xaxis.set_major_formatter("{x:g}")
        tidy(panel)
    panels[0].set_ylabel("relative error against the exact backward")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    return file


def tidy(panel: Any) -> None:
    panel.grid(color="0.9")
    panel.spines[["top", "right"]].set_visible(False)


def _label(report: Report) -> str:
    conditions = report["conditions"]
    return f"{conditions['data']}, T = {conditions['temperature']:g}, {conditions['mean_entropy']:.2f} nats"


def _blocks(report: Report) -> list[int]:
    return sorted({row["block"] for row in report["rows"]})
