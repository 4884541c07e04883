"""The table of what the GPU configs of recipes/reasoning take, by `fastkl plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.lib.markdown import markdown

REPORT = Path(__file__).parents[2] / "recipes" / "reasoning" / "gpu" / "plans.json"
PHASES = ("sampling", "teacher", "update")


def plans() -> str:
    """Memory and hours of each plan."""
    found: list[dict[str, Any]] = json.loads(REPORT.read_text(encoding="utf-8"))
    rows = []
    for plan in found:
        many = "" if plan["processes"] == 1 else (", FSDP 2" if plan["sharded"] else ", DDP")
        rows.append(
            [
                f"`{Path(plan['words'][0]).stem}`",
                f"{plan['processes']} × {plan['device']}{many}",
                f"{plan['peak']:g} of {plan['room']:g}",
                plan["phase"],
                *(f"{plan['hours'][name]:.2g}" if name in plan["hours"] else "server" for name in PHASES),
                f"{plan['step']:.2g}",
            ]
        )
    header = [
        "config",
        "of the trainer",
        "GiB at the peak",
        "which is in",
        "sampling, hours",
        "teacher",
        "update",
        "a step",
    ]
    return markdown(header, rows)


TABLES = {"plans": plans}
