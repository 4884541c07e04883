"""The run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, student/, report.html.

Whatever happens to the process, the folder stays usable: checkpoints appear by renaming, a log's rows beyond the newest
checkpoint are dropped when a run resumes, and one run at a time may write. Of several processes the first does so; every
method is called by all of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fastkl.trainer.config.settings import flat, refuse_renamed
from fastkl.trainer.config.training import RunConfig, as_dict
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import read_jsonl, write_text

INCOMPLETE = ".incomplete"
# Where and how a server is reached, not what it serves: a run that is resumed may find it elsewhere.
MAY_CHANGE = re.compile(
    r"((mixture\.[\w-]+\.)?teacher|sampling)\.server\."
    r"(url|sequences_per_request|weights|concurrency|timeout|retries|api_key_env)"
)


class RunFolder:
    """A run's folder, locked for this run while the context is open."""

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run)
        self.student = self.path / "student"
        self._checkpoints = self.path / "checkpoints"
        self._keep = config.checkpoint.keep
        self._lock = FileLock(self.path / ".lock")
        processes.on_main(lambda: self._open(config))
        processes.raise_together(self._check_shared)

    def _open(self, config: RunConfig) -> None:
        check_run_folder(config)
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"another process is writing to {self.path}; wait for it or choose another run"
            ) from error
        check_run_folder(config)  # again, now that no other process can start a run here
        write_text(self.path / "config.yaml", yaml.safe_dump(_settings(config), sort_keys=False, allow_unicode=True))
        self._checkpoints.mkdir(exist_ok=True)  # last: a folder without config.yaml holds nothing but the lock

    def _check_shared(self) -> None:
        if not (self.path / "config.yaml").is_file():
            raise ConfigError(
                f"{self.path.resolve()} is not the same folder on all hosts; put run on a file system that they share"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def log(self, file: str, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to metrics.jsonl or samples.jsonl."""

        def append() -> None:
            with self.room_for(file), open(self.path / file, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

        processes.on_main(append)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """Steps done and folder of the newest complete checkpoint."""
        folders = processes.on_main(lambda: sorted(self._checkpoints.glob("step-*")))
        return (int(folders[-1].name.removeprefix("step-")), folders[-1]) if folders else None

    def save_checkpoint(self, write: Callable[[Path], None], steps_done: int) -> None:
        """Has a checkpoint written aside, renames it into place, then drops the oldest ones."""
        target, aside = self._checkpoints / f"step-{steps_done:06d}", self._checkpoints / INCOMPLETE

        def prepare() -> bool:
            shutil.rmtree(aside, ignore_errors=True)
            if target.exists():
                return False
            aside.mkdir()
            return True

        def finish() -> None:
            os.rename(aside, target)
            for old in sorted(self._checkpoints.glob("step-*"))[: -self._keep]:
                shutil.rmtree(old)

        with self.room_for(target.name):
            if processes.on_main(prepare):
                write(aside)
                processes.on_main(finish)

    def save_student(self, write: Callable[[Path], None]) -> None:
        """Has the student written aside, then puts it in place of one that a run has saved before.

        What else is in that folder stays there.
        """
        aside, old = (self.path / f"student.{name}" for name in ("incomplete", "old"))

        def save() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            write(aside)
            if self.student.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.student, old)
            os.rename(aside, self.student)
            if old.exists():
                for path in old.iterdir():
                    if not (self.student / path.name).exists():
                        os.rename(path, self.student / path.name)
                shutil.rmtree(old)

        with self.room_for("student"):
            processes.on_main(save)

    def rewind(self, steps_done: int) -> None:
        """Drops what the logs hold beyond a checkpoint, and a line that a crash cut short."""

        def drop(name: str) -> None:
            rows = [row for row in read_jsonl(self.path / name) if row["step"] <= steps_done]
            with self.room_for(name):
                write_text(self.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        for name in ("metrics.jsonl", "samples.jsonl"):
            processes.on_main(partial(drop, name))

    @contextmanager
    def room_for(self, what: str) -> Iterator[None]:
        """A full disk ends a run in one sentence. What a checkpoint that did not fit has taken is given back."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if processes.rank() == 0:
                for left in (self._checkpoints / INCOMPLETE, self.path / "student.incomplete"):
                    shutil.rmtree(left, ignore_errors=True)
            raise RunError(
                f"{what} could not be written in {self.path}: {error}. Earlier checkpoints are whole; make room, and the "
                f"same command goes on from the last one"
            ) from error


def check_run_folder(config: RunConfig) -> None:
    """Refuses a folder that holds a run with another config, or something that is no run."""
    path = Path(config.run)
    known = path / "config.yaml"
    if known.is_file():
        before = yaml.safe_load(known.read_text(encoding="utf-8"))
        refuse_renamed(flat(before), f"{path} holds a run of that version; choose another run folder")
        changes = list(_differences(before, _settings(config)))
        if changes:
            raise ConfigError(
                f"{path} holds a run with another config: {'; '.join(changes)}. Choose another run folder, or the old "
                f"settings to resume"
            )
    elif path.exists() and not (
        path.is_dir() and {entry.name for entry in path.iterdir()} <= {".lock", ".config.yaml.new"}
    ):
        raise ConfigError(f"{path} exists and is not a run folder (no config.yaml); choose another run folder")


def flat_settings(config: RunConfig) -> dict[str, str | int | float | bool]:
    """The settings under their full names (`optim.lr`), for trackers; lists and null as text."""
    return {
        name: value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
        for name, value in flat(as_dict(config))
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """What config.yaml holds: everything but the folder's own name, for a run may be moved."""
    return {name: value for name, value in as_dict(config).items() if name != "run"}


def _differences(before: Any, now: Any, name: str = "") -> Iterable[str]:
    """The settings that differ, as "optim.lr was 0.1 and is 0.2"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now and not MAY_CHANGE.fullmatch(name):
        yield f"{name} was {before!r} and is {now!r}"
