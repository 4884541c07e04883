"""The evaluations of a run, and which was the best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

ACCURACY = "eval/accuracy"


class Evaluated(NamedTuple):
    """After so many steps."""

    step: int
    accuracy: float
    error: float  # its standard error; 0 where that is not known


def evaluations(rows: Iterable[Mapping[str, Any]]) -> list[Evaluated]:
    """Those in rows of metrics.jsonl, in their order."""
    return [Evaluated(row["step"], row[ACCURACY], row.get(f"{ACCURACY}_se", 0.0)) for row in rows if ACCURACY in row]


def best_of(found: Sequence[Evaluated]) -> Evaluated | None:
    """The best, and of equals the first; None without any."""
    return max(found, key=lambda each: each.accuracy, default=None)
