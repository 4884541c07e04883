"""A JSONL file that grows while a command works, and that the same command goes on with after it was ended."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkl.trainer.config.settings import flat
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import write_text


class Output:
    """Rows in a file, with a note beside it of what they were made from. Every method is called by all processes.

    Args:
        name: The file; None: the rows are kept in memory alone.
        settings: What the rows depend on. A file with other ones is refused, and so is a file that is none of this.
    """

    def __init__(self, name: str | None, settings: Mapping[str, Any]) -> None:
        self.path = None if name is None else Path(name)
        self.total = 0
        self.rows: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        if self.path is not None:
            processes.on_main(self._check)

    def begin(self, total: int, **content: str) -> None:
        """Reads the rows that are there already: of so many, made from `content` (fingerprints by name)."""
        self.total = total
        self._settings |= content
        if self.path is not None:
            self.rows = processes.on_main(self._rows_before)

    def keep(self, count: int) -> None:
        """Drops all rows but the first so many."""
        if self.path is not None and count < len(self.rows):
            processes.on_main(lambda: self._cut(count))
        del self.rows[count:]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows; they are on the disk when this returns."""
        new = [dict(row) for row in rows]
        if self.path is not None:
            with self._room():
                processes.on_main(lambda: self._append(new))
        self.rows += new

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C says where the same command goes on."""
        try:
            yield
        except KeyboardInterrupt as error:
            where = f"the same command goes on after row {len(self.rows)} of {self.total} in {self.path}"
            raise KeyboardInterrupt(f"interrupted; {where if self.path else 'nothing was written'}") from error

    @property
    def _note(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f".{self.path.name}.config")

    def _check(self) -> None:
        """The file is not there yet, or comes from the same settings; a new one can be written."""
        assert self.path is not None
        if self.path.is_file():
            self._compare({name: value for name, value in self._read_note().items() if name in self._settings})
        folder = next(above for above in self.path.absolute().parents if above.exists())
        try:
            if self.path.exists():
                open(self.path, "ab").close()
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ConfigError(
                f"output {self.path} cannot be written ({error}); name a file in a folder of yours"
            ) from error

    def _rows_before(self) -> list[dict[str, Any]]:
        assert self.path is not None
        if not self.path.exists():
            return []
        self._compare(self._read_note())
        lines = self._whole_lines()
        os.truncate(self.path, sum(len(line) + 1 for line in lines))
        return [json.loads(line) for line in lines]

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = None
        if not isinstance(note, dict):
            raise ConfigError(f"output {self.path} exists already; move it away or choose another name")
        return note

    def _compare(self, before: dict[str, Any]) -> None:
        was, now = dict(flat(before)), dict(flat(self._settings))
        others = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if others:
            changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in others)
            raise ConfigError(
                f"output {self.path} holds rows of another config: {changes}. Choose another name, or the old settings to "
                f"go on"
            )

    def _whole_lines(self) -> list[bytes]:
        """A last line that was cut short is none."""
        assert self.path is not None
        return self.path.read_bytes().split(b"\n")[:-1]

    def _cut(self, count: int) -> None:
        assert self.path is not None
        os.truncate(self.path, sum(len(line) + 1 for line in self._whole_lines()[:count]))

    def _append(self, rows: list[dict[str, Any]]) -> None:
        assert self.path is not None
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._note, json.dumps(self._settings))
        with open(self.path, "ab") as file:
            file.write(b"".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"output {self.path} could not be written: {error}. The first {len(self.rows)} of {self.total} rows are in "
                f"it; make room, and the same command goes on after them"
            ) from error


def _line(row: Mapping[str, Any]) -> bytes:
    """Half of a surrogate pair, which is no text, is written as JSON's escape."""
    try:
        return f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row, default=str)}\n".encode()
