"""Command lines and configs of short runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkl.trainer.commands import command_line as commands

Settings = dict[str, object]

# The least that each command with settings must be given.
MINIMAL: dict[str, dict[str, object]] = {
    "distill": {"run": "runs/a", "student.path": "s", "teacher.path": "t", "data.path": "d.jsonl"},
    "probe": {"run": "runs/a", "student.path": "s", "teacher.path": "t", "data.path": "d.jsonl"},
    "sft": {"run": "runs/a", "student.path": "s", "data.path": "d.jsonl"},
    "eval": {"model.path": "m", "eval.data.path": "d.jsonl"},
    "sample": {"output": "o.jsonl", "model.path": "m", "data.path": "d.jsonl"},
    "score": {"output": "o.jsonl", "model.path": "m", "data.path": "d.jsonl"},
}
URL = "http://127.0.0.1:9/v1"
SERVED: dict[str, object] = {"teacher.path": "", "teacher.server.url": URL, "teacher.server.model": "m"}


def arguments(command: str, settings: Mapping[str, object]) -> list[str]:
    """A command line: `{"optim.lr": 0.1}` becomes `--optim.lr=0.1`."""
    return [command, *(f"--{name}={json.dumps(v) if isinstance(v, list) else v}" for name, v in settings.items())]


def config(command: str, settings: Mapping[str, object]) -> Any:
    """The config that a command line stands for; the same door as a user's."""
    return commands.parse(arguments(command, settings))[1]


def training(run: Path, folder: Path, **overrides: object) -> dict[str, object]:
    """Settings of a short run with the folder's student and sums; `optim__lr=1` sets optim.lr."""
    settings = {"run": run, "student.path": folder / "student", "data.path": folder / "sums.jsonl"}
    settings |= {"optim.lr": 0.01, "optim.steps": 3, "log_samples": 1000}
    return settings | {name.replace("__", "."): value for name, value in overrides.items()}


def distillation(run: Path, folder: Path, **overrides: object) -> dict[str, object]:
    """The same with the folder's teacher."""
    small = {"teacher__path": folder / "teacher", "sampling__prompts_per_step": 6, "sampling__max_new_tokens": 8}
    return training(run, folder, **{**small, **overrides})


def evaluated(folder: Path, **overrides: object) -> dict[str, object]:
    """What a run is given in addition to evaluate on the same sums."""
    return {"eval__data__path": folder / "sums.jsonl", "eval__max_new_tokens": 4, **overrides}
