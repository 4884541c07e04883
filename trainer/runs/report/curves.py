"""A run's metrics as curves, each of a bounded number of points."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

POINTS = 1000  # of a curve
ALIKE = 1e-3  # of its largest value: closer than a line is wide

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


def merged(figures: Sequence[Json], runs: Sequence[Json]) -> list[Json]:
    """The figures of a page, of which one that would show the lines of another before it is named there, under `same`."""
    kept: list[Json] = []
    for figure in figures:
        twin = next(
            (one for one in kept if _agree(one, figure) and _same_lines(one["name"], figure["name"], runs)), None
        )
        if twin is None:
            kept.append({**figure, "same": []})
        else:
            twin["same"].append(figure["name"])
            twin["unit"] = twin["unit"] or figure["unit"]
    return kept


def _agree(one: Json, other: Json) -> bool:
    """In one part of the page, and in one unit where both have any."""
    return one["part"] == other["part"] and (one["unit"] == other["unit"] or not (one["unit"] and other["unit"]))


def _same_lines(one: str, other: str, runs: Sequence[Json]) -> bool:
    pairs = [(run["series"].get(one), run["series"].get(other)) for run in runs]
    return all(_same_line(*pair) for pair in pairs if pair != (None, None))


def _same_line(one: Json | None, other: Json | None) -> bool:
    """By the rows that both have points at, for each was thinned on its own; lines at 0 say too little to be called one."""
    if one is None or other is None:
        return False
    ours, theirs = (dict(zip(curve["at"], curve["values"], strict=True)) for curve in (one, other))
    shared = ours.keys() & theirs.keys()
    numbers = [abs(value) for value in (*ours.values(), *theirs.values()) if not isinstance(value, str)]
    if 2 * len(shared) < max(len(ours), len(theirs)) or not any(numbers):
        return False
    near = ALIKE * max(numbers)
    return all(
        ours[row] == theirs[row]
        if isinstance(ours[row], str) or isinstance(theirs[row], str)
        else abs(ours[row] - theirs[row]) <= near
        for row in shared
    )


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
