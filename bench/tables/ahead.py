"""The tables of recipes/ahead: the seconds of a step, and what is learned from older samples."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from bench.lib.markdown import Report, table

RECIPE = Path(__file__).parents[2] / "recipes" / "ahead"


def overlap() -> str:
    """Seconds of a step where sampling and training take set times."""
    report = _read("overlap")
    found = {(row["sampling"], row["training"], row["steps_ahead"]): row["seconds"] for row in report["rows"]}
    rows = []
    for sampling, training in dict.fromkeys((row["sampling"], row["training"]) for row in report["rows"]):
        apart, at_once = (found[sampling, training, ahead] for ahead in (0, 1))
        each = (apart, sampling + training), (at_once, max(sampling, training))
        cells = [f"{seconds:.2f} (+{seconds - known:.2f})" for seconds, known in each]
        rows.append([f"{sampling:g}", f"{training:g}", *cells])
    header = ["sampling takes, s", "training takes, s", "a step at 0 ahead, s", "a step at 1 ahead, s"]
    said = (
        "In brackets what is above the sum of both, and above the longer one. Others used the machine at the same time"
    )
    return table(header, rows, said, [report])


def learning() -> str:
    """Where runs end that sample so many steps ahead."""
    report = _read("learning")
    rows = []
    for ahead in dict.fromkeys(row["steps_ahead"] for row in report["rows"]):
        own = [row for row in report["rows"] if row["steps_ahead"] == ahead]
        cells = [" / ".join(f"{scale * row[name]:.{digits}f}" for row in own) for name, scale, digits in SHOWN]
        rows.append([str(ahead), *cells, f"{fmean(row['mismatch'] for row in own):.3f}"])
    before = report["rows"][0]["before"]
    header = ["steps ahead", "`teacher_kl` at the end", "halfway", "accuracy, %", "`sampler_mismatch/mean_abs`"]
    said = f"A seed each, in the same order in all rows. The student begins at {before:.1%} accuracy"
    return table(header, rows, said, [report])


SHOWN = (("teacher_kl", 1, 3), ("halfway", 1, 3), ("accuracy", 100, 1))
TABLES = {"ahead-overlap": overlap, "ahead-learning": learning}


def _read(name: str) -> Report:
    report: Report = json.loads((RECIPE / f"{name}.json").read_text(encoding="utf-8"))
    return report
