"""What a report of any bench holds beside its figures, and where the committed ones are."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from bench.lib.machine import describe_machine, describe_versions

RESULTS, RECIPES = Path(__file__).parents[1] / "results", Path(__file__).parents[2] / "recipes"


def circumstances(device: str, *packages: str) -> dict[str, Any]:
    """Machine, versions (of `packages` too) and date: what the figures were measured on, with and when."""
    return {
        "machine": describe_machine(device),
        "versions": describe_versions(*packages),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def read_result(name: str) -> dict[str, Any]:
    """The report bench/results/`name`.json."""
    return _read(RESULTS / f"{name}.json")


def read_recipe(name: str) -> dict[str, Any]:
    """The report recipes/`name`.json."""
    return _read(RECIPES / f"{name}.json")


def by_implementation(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a report of `bench loss` on one shape."""
    return {row["impl"]: row for row in report["rows"]}


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
