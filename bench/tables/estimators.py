"""The tables of docs/objectives/objectives.md, from the reports of `python -m bench estimators`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.estimators.figure import error, found
from bench.estimators.study import USUAL_K
from bench.lib.markdown import Report, table
from bench.lib.report import read_result

Wanted = dict[str, dict[str, Any]]  # rows of a report, by what they are called
PAIRS = ("pruned", "healed", "drop2", "qwen")
STEPS = (1000, 4000, 16000)
BIASED: Wanted = {
    "`bucket`, the teacher's k": {"estimator": "bucket", "of": "teacher"},
    "`bucket`, the student's k": {"estimator": "bucket", "of": "student"},
    "`bucket`, both lists": {"estimator": "bucket", "of": "both"},
    "`renormalise`, the teacher's k": {"estimator": "renormalise", "of": "teacher"},
    "`drop`, the teacher's k": {"estimator": "drop", "of": "teacher"},
}
SAMPLED: Wanted = {
    "sampled tokens": {"estimator": "sampled", "baseline": "none"},
    "… less the batch's mean": {"estimator": "sampled", "baseline": "mean"},
    "… less the exact KL": {"estimator": "sampled", "baseline": "kl"},
    "… clipped at ±5": {"estimator": "clipped", "parameter": 5.0},
    "… clipped at ±1": {"estimator": "clipped", "parameter": 1.0},
}
POWERS: Wanted = {
    f"power {name}": {"estimator": "power", "parameter": alpha} for name, alpha in (("½", 0.5), ("1", 1.0))
}
LISTED: Wanted = {
    "`bucket`": {"estimator": "bucket"},
    "`sampled` tail, weight ½": {"estimator": "sampled tail", "parameter": 0.5},
    "`sampled` tail": {"estimator": "sampled tail", "parameter": 1.0},
}
WHOSE = {"teacher": "the teacher's 20", "student": "the student's 20", "both": "both lists"}
LISTS: Wanted = {f"{WHOSE[of]}, {name}": {**wanted, "of": of} for of in WHOSE for name, wanted in LISTED.items()}


def pairs() -> str:
    """What the rows are like."""
    reports = _reports()
    rows = [
        ["tokens, completions", *(f"{c['tokens']:,}, {c['completions']}" for c in map(_conditions, reports))],
        ["reverse KL, nats", *(f"{c['kl']:.2f}" for c in map(_conditions, reports))],
        *(
            [f"entropy of the {who}, nats", *(f"{c[f'{who}_entropy']:.2f}" for c in map(_conditions, reports))]
            for who in ("student", "teacher")
        ),
        *(
            [f"student's mass off {whose}", *(f"{_list(r, of)['mass_off']:.3f}" for r in reports)]
            for of, whose in WHOSE.items()
        ),
        *(
            [f"share of the KL in the `bucket` on {whose}", *(f"{_list(r, of)['kl_share']:.2f}" for r in reports)]
            for of, whose in WHOSE.items()
        ),
    ]
    return _table("rows", rows, reports)


def bias() -> str:
    """Relative bias of the gradient by logits, at each k."""
    reports = _reports()
    ks = sorted({row["k"] for row in reports[0]["rows"] if row["k"] is not None})

    def cell(report: Report, wanted: dict[str, Any]) -> str:
        return " / ".join(_figure(found(report, wanted, k), "bias") for k in ks)

    return _table(f"k = {' / '.join(map(str, ks))}", _lines(BIASED, reports, cell), reports)


def noise() -> str:
    """Variance of one sample, and the tokens at which noise² is what the bucket's bias² is."""
    reports = _reports()

    def cell(report: Report, wanted: dict[str, Any]) -> str:
        row = found(report, wanted)
        tokens = None if row is None else row["tokens"]
        return _figure(row, "variance") + ("" if tokens is None else f"; {_round(tokens)}")

    lines = SAMPLED | POWERS | {name: row for name, row in LISTS.items() if row["estimator"] != "bucket"}
    return _table("variance; tokens", _lines(lines, reports, cell), reports)


def errors() -> str:
    """Relative error of the head's gradient in steps of some sizes."""
    reports = _reports()

    def cell(report: Report, wanted: dict[str, Any]) -> str:
        row = found(report, wanted)
        values = [None if row is None else error(row, tokens) for tokens in STEPS]
        return " / ".join("?" if value is None else f"{value:.2f}" for value in values)

    header = f"error at {' / '.join(f'{tokens:,}' for tokens in STEPS)} tokens"
    return _table(header, _lines(SAMPLED | LISTS, reports, cell), reports)


def cosines() -> str:
    """Of the head's gradient of the whole batch with the exact one."""
    reports = _reports()

    def cell(report: Report, wanted: dict[str, Any]) -> str:
        return _figure(found(report, wanted), "cosine")

    listed = {name.replace("'s k", "'s 20"): row for name, row in BIASED.items()}
    clipped = {name: row for name, row in SAMPLED.items() if row["estimator"] == "clipped"}
    return _table("cosine", _lines(listed | clipped | POWERS, reports, cell), reports)


TABLES: dict[str, Callable[[], str]] = {
    "estimators-pairs": pairs,
    "estimators-bias": bias,
    "estimators-noise": noise,
    "estimators-errors": errors,
    "estimators-cosines": cosines,
}


def _reports() -> list[Report]:
    return [read_result(f"estimators-{name}") for name in PAIRS]


def _table(first: str, rows: Sequence[Sequence[str]], reports: Sequence[Report]) -> str:
    header = [first, *(_conditions(report)["label"] for report in reports)]
    return table(header, rows, "On-policy completions at temperature 1, distributions in float32", reports)


def _lines(wanted: Wanted, reports: Sequence[Report], cell: Callable[[Report, dict[str, Any]], str]) -> list[list[str]]:
    return [[name, *(cell(report, row) for report in reports)] for name, row in wanted.items()]


def _conditions(report: Report) -> dict[str, Any]:
    return dict(report["conditions"])


def _list(report: Report, of: str) -> dict[str, Any]:
    return next(row for row in report["lists"] if row["of"] == of and row["k"] == USUAL_K)


def _figure(row: dict[str, Any] | None, key: str) -> str:
    """Two digits, or three of what is larger."""
    value = None if row is None else row[key]
    if value is None:
        return "?"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def _round(tokens: float) -> str:
    """Two significant digits."""
    return f"{float(f'{tokens:.1e}'):,.0f}"
