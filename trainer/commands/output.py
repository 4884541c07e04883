"""A JSONL file that grows while a command works, and that the same command goes on with after it was ended."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.files import write_text
from fastkl.trainer.runs.settings import flat

Fields = Mapping[str, type | tuple[type, ...]]  # what a row has, with the type


class Output:
    """Rows in a file, with a note beside it of what they were made from. Every method is called by all processes.

    While the context is open, no other command writes to the file.

    Args:
        name: The file; None: the rows are kept in memory alone.
        settings: What the rows depend on. A file with other ones is refused, and so is a file that is none of this.
        fields: What every row has besides its `source`, with the type.
        setting: What names the file, for messages.
    """

    def __init__(self, name: str | None, settings: Mapping[str, Any], fields: Fields, setting: str = "output") -> None:
        self.path = None if name is None else Path(name)
        self._setting = setting
        self.rows: list[dict[str, Any]] = []
        self._sources: Sequence[str] = ()
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._fields: Fields = {"source": str, **fields}
        self._made: list[Path] = []
        self._lock: FileLock | None = None

    def __enter__(self) -> Output:
        if self.path is not None:
            processes.on_main(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        assert self.path is not None
        self._lock.release()
        if not self.path.exists():  # the command was refused, or ended before its first row
            Path(self._lock.lock_file).unlink(missing_ok=True)
            for folder in self._made:
                with suppress(OSError):  # something else is in it now
                    folder.rmdir()

    @property
    def total(self) -> int:
        """How many rows there will be."""
        return len(self._sources)

    def begin(self, sources: Sequence[str], **content: str) -> None:
        """Reads the rows that are there already: of these sources, made from `content` (fingerprints by name)."""
        self._sources = sources
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
    def _named(self) -> str:
        """How messages call the file."""
        return f"{self._setting} {self.path}"

    @property
    def _note(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f".{self.path.name}.config")

    def _open(self) -> None:
        """Checks the file, and takes it."""
        assert self.path is not None
        self._check()
        self._made = [folder for folder in self.path.absolute().parents if not folder.exists()]
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"{self._named}: another process is writing to it; wait for it or choose another name"
            ) from error
        except (OSError, NotImplementedError) as error:
            raise self._unusable(error) from error
        self._lock = lock

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
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self._named} cannot be written ({error}); name a file in a folder of yours")

    def _rows_before(self) -> list[dict[str, Any]]:
        assert self.path is not None
        if not self.path.exists():
            return []
        self._compare(self._read_note())
        lines = self._whole_lines()
        if len(lines) > self.total:
            raise ConfigError(
                f"{self._named} holds {len(lines)} rows, but the data has {self.total}; move the file away or choose "
                f"another name"
            )
        rows = [self._row(number, line) for number, line in enumerate(lines, start=1)]
        os.truncate(self.path, sum(len(line) + 1 for line in lines))
        return rows

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        """A row that was written before, checked."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row, fault = {}, "is not JSON"
        else:
            fault = self._fault(row, self._sources[number - 1])
        if fault:
            raise ConfigError(
                f"{self.path}:{number} {fault}, so the file is damaged; take out this line and all after it, and the "
                f"same command goes on, or choose another name"
            )
        found: dict[str, Any] = row
        return found

    def _fault(self, row: Any, source: str) -> str:
        """What is wrong with a row; empty where nothing is."""
        if not isinstance(row, dict):
            return f"is a {type(row).__name__}, not an object"
        for name, kind in self._fields.items():
            if not isinstance(row.get(name), kind):
                return f"has no {name}" if name not in row else f"has the {name} {str(row[name])[:40]!r}"
        return "" if row["source"] == source else f"is of {row['source']}, and {source} comes here"

    def _read_note(self) -> dict[str, Any]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            note = None
        if not isinstance(note, dict):
            raise ConfigError(f"{self._named} exists already; move it away or choose another name")
        return note

    def _compare(self, before: dict[str, Any]) -> None:
        was, now = dict(flat(before)), dict(flat(self._settings))
        others = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        if others:
            changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in others)
            raise ConfigError(
                f"{self._named} holds rows of another config: {changes}. Choose another name, or the old settings to "
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
                f"{self._named} could not be written: {error}. The first {len(self.rows)} of {self.total} rows are in "
                f"it; make room, and the same command goes on after them"
            ) from error


def _line(row: Mapping[str, Any]) -> bytes:
    """Half of a surrogate pair, which is no text, is written as JSON's escape."""
    try:
        return f"{json.dumps(row, ensure_ascii=False, default=str)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row, default=str)}\n".encode()
