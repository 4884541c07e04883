"""A run's metrics as curves, each of a bounded number of points."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

POINTS = 1000  # of a curve

Json = dict[str, Any]


def series(rows: Sequence[Json]) -> tuple[dict[str, Json], list[int]]:
    """Each metric's points, thinned out, and the rows that any of them is in; `at` counts those rows."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                points[name].append((number, value))
    thinned = {name: thin(values, POINTS) for name, values in points.items()}
    kept = sorted({row for values in thinned.values() for row, _ in values})
    position = {row: at for at, row in enumerate(kept)}
    curves = {
        name: {"at": [position[row] for row, _ in values], "values": [plain(value) for _, value in values]}
        for name, values in thinned.items()
    }
    return curves, kept


def thin(points: list[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """About `limit` of the points: the ends, and of each stretch its lowest, its highest, and one that is not finite."""
    if len(points) <= limit:
        return points
    value = itemgetter(1)
    width = math.ceil(3 * len(points) / limit)
    kept = {points[0][0]: points[0], points[-1][0]: points[-1]}
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        finite = [point for point in stretch if math.isfinite(point[1])]
        wild = [point for point in stretch if not math.isfinite(point[1])]
        for pick in (min(finite, key=value), max(finite, key=value)) if finite else ():
            kept[pick[0]] = pick
        kept |= {point[0]: point for point in wild[:1]}
    return [kept[row] for row in sorted(kept)]


def plain(value: float) -> float | str:
    """Six significant digits; NaN and infinities, which JSON has no number for, by their names."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
