"""The error of a batch's head gradient against the tokens of the batch, from reports of `python -m bench estimators`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.estimators.study import USUAL_K, usual_k
from bench.lib.sparse_figure import tidy

Report = dict[str, Any]
TOKENS = [10 ** (2 + step / 8) for step in range(33)]  # 100 … 1 000 000


class Line(NamedTuple):
    """What is drawn of each report, and how."""

    label: str
    style: str
    colour: int
    row: dict[str, Any]  # what its row of the report has


BUCKET, TAIL = {"estimator": "bucket"}, {"estimator": "sampled tail"}
LINES = (
    Line("sampled", "-", 3, {"estimator": "sampled", "baseline": "none"}),
    Line("sampled, the batch's mean as baseline", "--", 3, {"estimator": "sampled", "baseline": "mean"}),
    Line("sampled, the exact KL as baseline", ":", 3, {"estimator": "sampled", "baseline": "kl"}),
    Line("teacher's k, bucket", "-", 0, {**BUCKET, "of": "teacher"}),
    Line("… and the sampled tail at weight ½", ":", 0, {**TAIL, "of": "teacher", "parameter": 0.5}),
    Line("… and the sampled tail", "--", 0, {**TAIL, "of": "teacher", "parameter": 1.0}),
    Line("student's k, bucket", "-", 2, {**BUCKET, "of": "student"}),
    Line("… and the sampled tail at weight ½", ":", 2, {**TAIL, "of": "student", "parameter": 0.5}),
    Line("… and the sampled tail", "--", 2, {**TAIL, "of": "student", "parameter": 1.0}),
)


def draw_estimators(reports: Sequence[Report], file: Path, colours: Sequence[str]) -> Path:
    """A panel for each report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4, 3.6 * ((len(reports) + 1) // 2) + 1.2), layout="constrained", facecolor="white")
    panels = figure.subplots((len(reports) + 1) // 2, 2, sharex=True, squeeze=False)
    for panel, report in zip(panels.flat, reports, strict=False):
        _draw(panel, report, colours)
    for panel in panels.flat[len(reports) :]:
        panel.set_axis_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
    return file


def error(row: dict[str, Any], tokens: float) -> float | None:
    """The root mean square error of a batch's head gradient, relative to that of a batch without end."""
    if row["limit_bias"] is None:
        return None
    return float((row["limit_bias"] ** 2 + row["limit_noise"] / tokens) ** 0.5)


def found(report: Report, wanted: dict[str, Any], k: int = USUAL_K) -> dict[str, Any] | None:
    """The row that has what is wanted, on lists of k where it has a list, and with ρ + c where it has a ρ."""
    for row in report["rows"]:
        other = row["k"] not in (None, k) or row["baseline"] == "ρ"
        if not other and all(row[key] == value for key, value in wanted.items()):
            return dict(row)
    return None


def _draw(panel: Any, report: Report, colours: Sequence[str]) -> None:
    k = usual_k(entry["k"] for entry in report["lists"])
    for line in LINES:
        row = found(report, line.row, k)
        if row is not None and row["limit_bias"] is not None:
            errors = [error(row, tokens) for tokens in TOKENS]
            panel.plot(TOKENS, errors, label=line.label, color=colours[line.colour], linestyle=line.style)
    conditions = report["conditions"]
    panel.set(xscale="log", yscale="log", xlabel="tokens per optimizer step", ylabel="relative error of the gradient")
    panel.set_title(f"{conditions['label']}: KL {conditions['kl']:.2f} nats, k = {k}", fontsize=10)
    tidy(panel)
