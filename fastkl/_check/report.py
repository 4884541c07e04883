"""The tables of the checks as text, and what JSON has of them."""

from __future__ import annotations

import math
from typing import Any

from fastkl._check.errors import Measured
from fastkl._check.times import HEADS, SPARSE, Timed, Unit

NAME, CELL = 32, 16


def record(variant: str, one: Measured) -> dict[str, Any]:
    """A comparison as JSON has it, which knows no infinity."""
    error = one.error if math.isfinite(one.error) else None
    return {**one._asdict(), "variant": variant, "error": error, "ok": one.ok}


def header(title: str, columns: list[str]) -> str:
    return f"\n{title:{NAME}}" + "".join(f"{column:>{CELL}}" for column in columns)


def errors_line(kernel: str, cells: list[list[Measured]]) -> str:
    """Of each dtype the error that is nearest to its bound."""
    return f"{kernel:{NAME}}" + "".join(f"{_cell(found):>{CELL}}" for found in cells)


def _cell(found: list[Measured]) -> str:
    if not found:
        return "–    "
    worst = max(found, key=_share)
    return f"{worst.error:.1e}   ok" if worst.ok else f"{worst.error:.1e} FAILED"


def _share(one: Measured) -> float:
    """The error in units of its bound."""
    return one.error / one.bound if one.bound else 0.0 if one.ok else math.inf


def conclusion(checks: list[dict[str, Any]], seconds: float) -> list[str]:
    """The last lines: what failed, and how many did."""
    failed = [one for one in checks if not one["ok"]]
    count = f"{len(checks)} comparisons in {seconds:.0f} s"
    return [
        "",
        *map(_failure, failed),
        f"{count}: " + (f"{len(failed)} FAILED" if failed else "all within their bounds"),
    ]


def _failure(one: dict[str, Any]) -> str:
    error = "not finite" if one["error"] is None else f"{one['error']:.1e}"
    found = one["reason"] or f"error {error}, bound {one['bound']:.1e}"
    return f"FAILED  {one['kernel']}, {one['variant']}, {one['quantity']}: {found}"


def times_lines(unit: Unit, times: list[Timed]) -> list[str]:
    n, dim, vocabulary = unit.sizes
    return [
        header("time in units of one GEMM", list(HEADS)),
        *(f"{one.loss:{NAME}}" + "".join(f"{_units(one, name):>{CELL}}" for name in HEADS) for one in times),
        f"1 unit = [{n}, {dim}] × [{dim}, {vocabulary}] in {unit.dtype} = {unit.milliseconds:.2f} ms; (n): at least n",
    ]


def _units(one: Timed, head: str) -> str:
    return f"{one.units[head]:.2f}     " if one.loss == SPARSE else f"{one.units[head]:.2f}  ({one.floor[head]})"
