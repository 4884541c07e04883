"""Curves of a run as a PNG (matplotlib, imported here alone)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_run(metrics: list[dict[str, Any]], path: Path, *, title: str, lines: dict[str, float]) -> None:
    """teacher_kl and held-out accuracy against steps; `lines` are levels to compare the accuracy with, by label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    figure.suptitle(title)
    left.plot(*_curve(metrics, "teacher_kl"), color="tab:blue")
    left.set(xlabel="step", ylabel="teacher_kl (nats per token)", ylim=(0, None))
    right.plot(*_curve(metrics, "eval/accuracy"), marker="o", color="tab:green", label="student")
    for (label, level), style in zip(lines.items(), ("--", ":", "-."), strict=False):
        right.axhline(level, color="gray", linestyle=style, label=label)
    right.set(xlabel="step", ylabel="held-out accuracy", ylim=(0, 1.02))
    right.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curve(metrics: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]
