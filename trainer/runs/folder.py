"""The run folder: config.yaml, metrics.jsonl, samples.jsonl, guards.jsonl, checkpoints/, student/, report.html.

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
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fastkl.trainer.config.training import RunConfig, as_dict
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.changes import Change, check_settings, record_changes, settings_text
from fastkl.trainer.runs.checkpoint import FILES
from fastkl.trainer.runs.files import read_jsonl, write_text
from fastkl.trainer.runs.seal import Damaged, check_seal, seal, sync
from fastkl.trainer.runs.settings import flat

INCOMPLETE = ".incomplete"
DAMAGED = ".damaged"  # what follows the name of a checkpoint that cannot be read
LOGS = ("metrics.jsonl", "samples.jsonl", "guards.jsonl")
_STEP = re.compile(r"step-(\d+)")
_LEFTOVERS = {".lock", ".config.yaml.new"}  # of a run that never began


class Checkpoint(NamedTuple):
    """The steps that are done in it, and where it is."""

    steps_done: int
    path: Path


class RunFolder:
    """A run's folder, locked for this run while the context is open. Before `begin` nothing but the lock is written."""

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.run)
        self.student = self.path / "student"
        self._student_aside = self.path / f"student{INCOMPLETE}"
        self._checkpoints = self.path / "checkpoints"
        self._had_checkpoint = self.path / ".checkpoint"  # there as soon as one was complete, and when all are gone
        self._config = config
        self._made: list[Path] = []
        self._lock = FileLock(self.path / ".lock")
        self.changes, self.checkpoint, self._damaged = processes.on_main(self._open)
        processes.raise_together(self._check_shared)

    def _open(self) -> tuple[list[Change], Checkpoint | None, list[tuple[Path, Damaged]]]:
        """Locks the folder; what was changed, where the run goes on, and newer checkpoints that are damaged."""
        check_run_folder(self._config)
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"another process is writing to {self.path}; wait for it or choose another run"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise _unusable(self.path, error) from error
        try:
            changes = check_run_folder(self._config)  # again, now that no other process can start a run here
            if self.student.is_symlink() or self.student.is_file():
                raise ConfigError(f"{self.student} is a link or a file, where the run writes a folder; move it away")
            checkpoint, damaged = self._newest_checkpoint()
            if checkpoint is None:
                self._check_unbegun()
            elif changes and checkpoint.steps_done >= self._config.optim.steps:
                raise ConfigError(
                    f"{self.path} has done {checkpoint.steps_done} steps, and optim.steps is {self._config.optim.steps}: "
                    f"nothing is left to do with {'; '.join(map(str, changes))}. Raise optim.steps to go on"
                )
        except (ConfigError, RunError):
            self._lock.release()
            raise
        return changes, checkpoint, damaged

    def _check_shared(self) -> None:
        if not (self.path / ".lock").is_file():
            raise ConfigError(
                f"{self.path.resolve()} is not the same folder on all hosts; put run on a file system that they share"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if self._made and self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= _LEFTOVERS:
            shutil.rmtree(self.path)  # the run was refused, or ended before it began
            for parent in self._made[1:]:
                with suppress(OSError):  # another run has begun beside it
                    parent.rmdir()

    def begin(self) -> list[str]:
        """Drops what the logs hold beyond the checkpoint, and writes down the settings; returns what is to be said."""
        start = -1 if self.checkpoint is None else self.checkpoint.steps_done

        def write() -> list[str]:
            with self.room_for("config.yaml"):
                put_aside = [_put_aside(path, damage) for path, damage in self._damaged]
                record_changes(self.path, self.changes, max(0, start))
                write_text(self.path / "config.yaml", settings_text(self.path, self._config))
                self._checkpoints.mkdir(exist_ok=True)
            return [*put_aside, *(f"{change} from here on" for change in self.changes)]

        said = processes.on_main(write)
        self.rewind(start)
        return said

    def _check_unbegun(self) -> None:
        """No checkpoint was ever complete, and there is no student."""
        if self._had_checkpoint.exists() or self.student.exists():
            logged = max((row["step"] for row in _rows(self.path / LOGS[0])), default=0)
            raise ConfigError(
                f"{self.path} holds a run of {logged} steps, but its checkpoints are gone: it cannot go on, and would be "
                f"begun again. Bring {self._checkpoints.name}/ back, or choose another run folder (student.path "
                f"{self.student} goes on from the trained student, if it is there)"
            )

    def log(self, file: str, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows to one of LOGS."""

        def append() -> None:
            with self.room_for(file), open(self.path / file, "a", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

        processes.on_main(append)

    def _newest_checkpoint(self) -> tuple[Checkpoint | None, list[tuple[Path, Damaged]]]:
        """The newest checkpoint that is whole, and the damaged ones after it.

        Raises:
            RunError: If there are checkpoints and all are damaged.
        """
        damaged: list[tuple[Path, Damaged]] = []
        for checkpoint in reversed(_checkpoints_in(self._checkpoints)):
            try:
                check_seal(checkpoint.path, FILES)
            except Damaged as damage:
                damaged.append((checkpoint.path, damage))
                continue
            return checkpoint, damaged
        if damaged:
            raise RunError(
                f"no checkpoint in {self._checkpoints} is whole ({'; '.join(f'{p.name}: {d}' for p, d in damaged)}). Bring "
                f"one back from a copy, or choose another run folder"
            )
        return None, []

    def checkpoint_of(self, steps_done: int) -> Path | None:
        """The checkpoint after so many steps, if it is there and whole."""
        path = self._checkpoint_path(steps_done)
        try:
            check_seal(path, FILES)
        except Damaged:
            return None
        return path

    def _checkpoint_path(self, steps_done: int) -> Path:
        return self._checkpoints / f"step-{steps_done:06d}"

    def save_checkpoint(self, write: Callable[[Path], None], steps_done: int, best: int | None = None) -> None:
        """Has a checkpoint written aside, renames it into place, then drops the oldest ones, but for that after `best`."""
        target, aside = self._checkpoint_path(steps_done), self._checkpoints / INCOMPLETE

        def prepare() -> bool:
            shutil.rmtree(aside, ignore_errors=True)
            if target.exists():
                return False
            aside.mkdir()
            return True

        def finish() -> None:
            seal(aside)
            os.rename(aside, target)
            sync(self._checkpoints)
            self._had_checkpoint.touch()
            for old in _checkpoints_in(self._checkpoints)[: -self._config.checkpoint.keep]:
                if old.steps_done != best:
                    shutil.rmtree(old.path)

        with self.room_for(target.name):
            if processes.on_main(prepare):
                write(aside)
                processes.on_main(finish)

    def save_student(self, write: Callable[[Path], None]) -> None:
        """Has the student written aside, then puts it in place of one that a run has saved before.

        What else is in that folder stays there.
        """
        aside, old = self._student_aside, self.path / "student.old"

        def save() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            write(aside)
            _move_rest(old, self.student)  # of a save that was killed
            if self.student.exists():
                os.rename(self.student, old)
            os.rename(aside, self.student)
            _move_rest(old, self.student)

        with self.room_for("student"):
            processes.on_main(save)

    def rewind(self, steps_done: int) -> None:
        """Drops what the logs hold beyond a checkpoint, and a line that a crash cut short."""

        def drop(name: str) -> None:
            if not (self.path / name).exists():
                return
            rows = [row for row in _rows(self.path / name) if row["step"] <= steps_done]
            with self.room_for(name):
                write_text(self.path / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

        for name in LOGS:
            processes.on_main(partial(drop, name))

    @contextmanager
    def room_for(self, what: str) -> Iterator[None]:
        """A full disk ends a run in one sentence. What a checkpoint that did not fit has taken is given back."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if processes.rank() == 0:
                for left in (self._checkpoints / INCOMPLETE, self._student_aside):
                    shutil.rmtree(left, ignore_errors=True)
            raise RunError(
                f"{what} could not be written in {self.path}: {error}. Is the disk full? Then make room. Checkpoints "
                f"that are there are whole: the same command goes on from the last one"
            ) from error


def check_run_folder(config: RunConfig) -> list[Change]:
    """Refuses a folder that holds a run with another config, or something that is no run; returns the allowed changes."""
    path = Path(config.run)
    try:
        if (path / "config.yaml").is_file():
            return check_settings(path, config)
        taken = path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= _LEFTOVERS)
    except OSError as error:
        raise _unusable(path, error) from error
    if taken:
        raise ConfigError(f"{path} exists and is not a run folder (no config.yaml); choose another run folder")
    return []


def flat_settings(config: RunConfig) -> dict[str, str | int | float | bool]:
    """The settings under their full names (`optim.lr`), for trackers; lists and null as text."""
    return {
        name: value if isinstance(value, (str, int, float, bool)) else json.dumps(value)
        for name, value in flat(as_dict(config))
    }


def _unusable(path: Path, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return ConfigError(f"run is {str(path)!r}, where nothing can be written ({reason}); choose another run folder")


def _move_rest(old: Path, new: Path) -> None:
    """Moves what only an old folder has into the new one, or all of it where there is no new one; then it is gone."""
    if not new.exists() and old.exists():
        os.rename(old, new)
    if old.exists():
        for path in old.iterdir():
            if not (new / path.name).exists():
                os.rename(path, new / path.name)
        shutil.rmtree(old)


def _put_aside(checkpoint: Path, damage: Damaged) -> str:
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(checkpoint, aside)
    return f"{checkpoint} is damaged: {damage}. It is {aside.name} now, and the checkpoint before it is taken"


def _checkpoints_in(folder: Path) -> list[Checkpoint]:
    """From the oldest to the newest."""
    steps = [(match, path) for path in folder.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return sorted(Checkpoint(int(match[1]), path) for match, path in steps)


def _rows(log: Path) -> list[dict[str, Any]]:
    """The rows of a log that belong to a step."""
    return [row for row in read_jsonl(log) if type(row.get("step")) is int]
