"""Time and memory against N, D and V, drawn from the JSON files of `python -m bench loss`.

    python -m bench plot bench/results/*.json --out FOLDER

A sweep is a series of shapes that differ in one size alone. There is one PNG for each op, head, dtype, kind of rows and
machine that the files have a sweep for. If a measurement was made twice, the later one is drawn. Reports of `bench models`
are read too. Reports of `bench sparse` become sparse.png, those of `bench estimators` estimators.png. Other files are
ignored.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.estimators.figure import draw_estimators
from bench.lib.arguments import AXES
from bench.lib.report import RESULTS, counted
from bench.lib.sparse_figure import draw_sparse, tidy

PANELS = {"forward_backward_ms": "forward + backward, ms", "peak_extra_mb": "extra memory, MB"}
# Colours of Okabe and Ito, told apart with any colour vision; markers for print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

Row = dict[str, Any]
Key = tuple[str, ...]  # op, head, dtype, data, machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="FILE", help="read these; bench/results/*.json by default"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="put the PNGs there; made if missing")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    try:
        reports = read(files)
        figures = {key: rows for key, rows in measured(reports).items() if any(sweep(rows, axis) for axis in AXES)}
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"argument FILE: cannot be read as a report of the bench: {type(error).__name__}: {error}")
    estimates = [report for report in reports if "kept" in report["rows"][0]]
    estimators = [report for report in reports if "estimator" in report["rows"][0]]
    if not figures and not estimates and not estimators:
        parser.error(
            "argument FILE: no sweep in there; make one with `python -m bench loss --sweep N=256,512,1024 --json …`"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for key, rows in figures.items():
        print(draw(key, rows, arguments.out))
    if estimates:
        print(draw_sparse(estimates, arguments.out / "sparse.png", COLOURS, MARKERS))
    if estimators:
        print(draw_estimators(estimators, arguments.out / "estimators.png", COLOURS))


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The reports of all files that have rows, the oldest first."""
    contents = (json.loads(file.read_text()) for file in files)
    reports = [report for content in contents for report in content.get("reports", [content]) if report.get("rows")]
    return sorted(reports, key=lambda report: str(report["date"]))


def measured(reports: Iterable[dict[str, Any]]) -> dict[Key, list[Row]]:
    """The rows of the losses' reports by what must be equal for them to share a line."""
    latest: dict[Key, dict[tuple[str, ...], Row]] = defaultdict(dict)
    for report in reports:
        machine = report["machine"]
        device = machine.get("gpu") or f"{machine['cpu']}, {counted(machine['threads'], 'thread')}"
        for row in (row for row in report["rows"] if "op" in row):
            key = row["op"], row["head"], row["dtype"], report["conditions"].get("data", "peaked"), device
            latest[key][row["impl"], str(row["shape"])] = row
    return {key: list(rows.values()) for key, rows in latest.items()}


def sweep(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows of the longest series of shapes that differ along `axis` alone; none if there is no such series."""
    swept = AXES.index(axis)
    series: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        series[str([size for i, size in enumerate(row["shape"]) if i != swept])].append(row)
    longest = max(series.values(), key=lambda s: len(_sizes(s, axis)), default=[])
    return longest if len(_sizes(longest, axis)) > 1 else []


def draw(key: Key, rows: Sequence[Row], folder: Path) -> Path:
    """One figure: a column for each axis that was swept, a row for time and one for memory."""
    from matplotlib.figure import Figure

    sweeps = {axis: series for axis in AXES if (series := sweep(rows, axis))}
    op, head, dtype, data, machine = key
    figure = Figure(figsize=(4.6 * len(sweeps) + 0.4, 7.2), layout="constrained", facecolor="white")
    figure.suptitle(f"{op}, {head} head, {dtype}, {data} rows\n{machine}", fontsize=11)
    panels = figure.subplots(len(PANELS), len(sweeps), squeeze=False, sharey="row")
    names = list(dict.fromkeys(row["impl"] for row in rows))
    for column, (axis, series) in enumerate(sweeps.items()):
        for line, (value, label) in enumerate(PANELS.items()):
            panel = panels[line][column]
            _draw_panel(panel, series, axis, value, names)
            if column == 0:
                panel.set_ylabel(label)
        panels[0][column].set_title(_fixed(series[0], axis), fontsize=10)
        panels[-1][column].set_xlabel(axis)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    file = folder / f"{re.sub(r'[^a-z0-9_]+', '-', '-'.join(key).lower())}.png"
    figure.savefig(file, dpi=150)
    return file


def _draw_panel(panel: Any, rows: Sequence[Row], axis: str, value: str, names: Sequence[str]) -> None:
    """A line for each implementation, both scales logarithmic, ticks at the sizes that were measured."""
    from matplotlib.ticker import LogLocator

    swept = AXES.index(axis)
    for i, name in enumerate(names):
        points = sorted((row["shape"][swept], row[value]) for row in rows if row["impl"] == name)
        style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        panel.plot([size for size, _ in points], [y for _, y in points], label=name, **style)
    sizes = _sizes(rows, axis)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("")
    tidy(panel)


def _sizes(rows: Iterable[Row], axis: str) -> list[int]:
    return sorted({row["shape"][AXES.index(axis)] for row in rows})


def _fixed(row: Row, axis: str) -> str:
    """The sizes that do not change along `axis`, as in "D = 256, V = 32768"."""
    return ", ".join(f"{name} = {size}" for name, size in zip(AXES, row["shape"], strict=True) if name != axis)
