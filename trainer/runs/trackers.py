"""The trackers of a run: a run that goes on goes on in them too."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fastkl.trainer.config.training import RunConfig
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import write_text
from fastkl.trainer.runs.folder import flat_settings

ID = ".tracker"  # the file with the run's name for trackers that know runs by one


def start_trackers(accelerator: Accelerator, config: RunConfig, folder: Path, steps_done: int | None) -> None:
    """Opens `config.trackers`, for a run that begins (None) or that goes on after so many steps."""
    if not config.trackers:
        return
    name = processes.on_main(lambda: _run_name(folder))
    options: dict[str, dict[str, Any]] = {
        "wandb": {"id": name, "name": folder.resolve().name, "resume": "allow"},
        "trackio": {"name": name, "resume": "allow"},
    }
    if steps_done is not None:
        options["tensorboard"] = {"purge_step": steps_done + 1}  # hides what was written beyond the checkpoint
    accelerator.init_trackers("fastkl", config=flat_settings(config), init_kwargs=options)


def _run_name(folder: Path) -> str:
    """A name that no other run has, made when the run begins."""
    file = folder / ID
    if not file.is_file():
        write_text(file, f"{folder.resolve().name[:64]}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text(encoding="utf-8").strip()
