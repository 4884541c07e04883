"""What a report of any bench holds beside its figures, and where the committed ones are."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from bench.lib.machine import describe_machine, describe_versions

RESULTS = Path(__file__).parents[1] / "results"


def circumstances(device: str, *packages: str) -> dict[str, Any]:
    """Machine, versions (of `packages` too) and date: what the figures were measured on, with and when."""
    return {
        "machine": describe_machine(device),
        "versions": describe_versions(*packages),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def read_result(name: str) -> dict[str, Any]:
    """The report bench/results/`name`.json."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def by_implementation(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a report of `bench loss` on one shape."""
    return {row["impl"]: row for row in report["rows"]}


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
