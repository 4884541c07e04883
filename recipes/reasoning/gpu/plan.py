"""The plans of these configs, from the sizes of their models: nothing is loaded, nothing was measured.

    python recipes/reasoning/gpu/plan.py        writes plans.json beside this file; then `python -m bench table --write`

Each line is a call of `fastkl plan`: `words` has its arguments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.commands.plan.assumed import planned
from fastkl.trainer.commands.plan.command import hours_of_step
from fastkl.trainer.commands.plan.devices import room
from fastkl.trainer.commands.plan.hours import durations
from fastkl.trainer.commands.plan.parts import Memory
from fastkl.trainer.commands.plan.work import UPDATE

FOLDER = Path(__file__).parent
REPORT = FOLDER / "plans.json"
GIB = 2**30
SHORT = {UPDATE: "update"}
ONE_NODE, NODES = (f"recipes/accelerate/{name}.yaml" for name in ("one_node", "nodes"))
# A config, the folders of its student's and its teacher's sizes, and more words of `fastkl plan`.
PLANS: list[tuple[str, str, str, list[str]]] = [
    ("qwen3-0.6b", "0.6b", "4b", ["--device", "h100"]),
    ("qwen3-1.7b", "1.7b", "8b", ["--device", "h200"]),
    ("qwen3-8b-lora", "8b", "32b", ["--device", "h200", "--processes", "8"]),
    ("qwen3-8b-full", "8b", "", ["--device", "h100", "--accelerate", ONE_NODE]),
    ("qwen3-8b-full", "8b", "", ["--device", "h100", "--accelerate", NODES]),
]


def words(config: str, student: str, teacher: str, more: list[str]) -> list[str]:
    """The arguments of a plan, from the top of the repository."""
    folder = "recipes/reasoning/gpu"
    models = ["--student.path", f"{folder}/sizes/{student}"]
    models += ["--teacher.path", f"{folder}/sizes/{teacher}"] if teacher else []
    return [f"{folder}/{config}.yaml", *models, *more]


def measure(arguments: list[str]) -> dict[str, Any]:
    """One plan, as numbers."""
    config = parse(["plan", *arguments])[1]
    run = planned(config).run
    memory, phases = Memory(run), list(durations(run, config))
    space = room(config.device, config.memory)
    assert space is not None
    return {
        "words": arguments,
        "device": config.device,
        "processes": run.processes.count,
        "sharded": run.processes.sharded,
        "peak": round(memory.peak / GIB, 1),
        "room": round(space / GIB, 1),
        "phase": memory.largest.name,
        "hours": {SHORT.get(phase.name) or phase.name.partition(" ")[0]: _rounded(phase.hours) for phase in phases},
        "step": _rounded(hours_of_step(config, phases)[0]),
    }


def _rounded(hours: float) -> float:
    return float(f"{hours:.3g}")


if __name__ == "__main__":
    report = [measure(words(*each)) for each in PLANS]
    REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
