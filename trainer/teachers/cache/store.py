"""Bytes by key in an SQLite file: what is written is whole or not there, whoever is killed, and processes can share it.

Whatever is wrong with the file later costs scores that are computed again, and a line that says so: never the run.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import note
from fastkl.trainer.servers.recheck import distance

NAME = "scores.sqlite"
PATIENCE = 60.0  # seconds that one process waits for another
AT_ONCE = 500  # keys of a query
LEFT_OF_LOG = 2**26  # bytes of the write-ahead log that stay on the disk
TABLES = """
    CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, digest BLOB NOT NULL, content BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS servers (description TEXT NOT NULL, identity TEXT NOT NULL, probe TEXT NOT NULL);
"""

Result = TypeVar("Result")


class Store:
    """The scores in a folder. Each call opens the file anew, so that threads and forked processes may share one.

    Args:
        folder: Made where it is missing.
        most: Bytes that the file may have: beyond them the scores that were written first are forgotten.

    Raises:
        ConfigError: If nothing can be written there.
    """

    def __init__(self, folder: Path, most: float) -> None:
        self._path, self._most = folder / NAME, most
        self._said: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self._open() as connection:
                connection.executescript(TABLES)
        except (OSError, sqlite3.OperationalError) as error:
            raise ConfigError(
                f"teacher.cache: {self._path} cannot be written ({error}); name another folder, or unset it"
            ) from error
        except sqlite3.DatabaseError as error:
            self._say(f"is damaged ({error}): nothing is read from it or kept in it. Delete it")

    def get(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """What is there of these keys, and is what was written."""

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found = {}
            for some in _pieces(list(keys)):
                marks = ",".join("?" * len(some))
                for key, digest, content in connection.execute(f"SELECT * FROM scores WHERE key IN ({marks})", some):
                    if digest == _digest(key, content):
                        found[key] = content
                    else:
                        self.damaged()
            return found

        return self._try(read, {}, "cannot be read")

    def put(self, contents: Mapping[bytes, bytes]) -> None:
        """All of them or none; one that was there is replaced."""
        rows = [(key, _digest(key, content), content) for key, content in contents.items()]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)
            self._forget(connection)

        self._try(write, None, "cannot be written")

    def identity(self, description: str, probe: Sequence[float], limit: float, fresh: Callable[[], str]) -> str:
        """The name of a server that described itself so and gave a text log-probs like these.

        One that nobody has met gets a `fresh` name.

        Args:
            limit: So many nats away, on average over the text, is another server.
        """

        def find(connection: sqlite3.Connection) -> str:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute(
                "SELECT identity, probe FROM servers WHERE description = ? ORDER BY rowid", [description]
            )
            near = [(_apart(json.loads(text), probe), name) for name, text in known]
            apart, name = min(near, default=(float("inf"), ""), key=lambda pair: pair[0])
            if apart > limit:
                name = fresh()
                row = (description, name, json.dumps([*probe]))
                connection.execute("INSERT INTO servers VALUES (?, ?, ?)", row)
            return name

        return self._try(find, "", "cannot be read") or fresh()

    def damaged(self) -> None:
        """Says that an entry is not what was written."""
        self._say("has damaged entries: those scores are computed again")

    def _forget(self, connection: sqlite3.Connection) -> None:
        """Takes out the first entries until the others have room."""
        size, pages, free = (
            connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
        )
        excess, last = size * (pages - free) - self._most, None
        for row, length in connection.execute("SELECT rowid, length(content) FROM scores ORDER BY rowid"):
            if excess <= 0:
                break
            excess, last = excess - length, row
        if last is not None:
            connection.execute("DELETE FROM scores WHERE rowid <= ?", [last])

    def _try(self, work: Callable[[sqlite3.Connection], Result], otherwise: Result, trouble: str) -> Result:
        try:
            with self._open() as connection:
                return work(connection)
        except sqlite3.Error as error:
            self._say(f"{trouble} ({error}): what it lacks is computed again")
            return otherwise

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection whose transaction is kept if nothing is raised."""
        connection = sqlite3.connect(self._path, timeout=PATIENCE, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA journal_size_limit = {LEFT_OF_LOG}")
            yield connection
            if connection.in_transaction:
                connection.execute("COMMIT")
        finally:
            connection.close()  # which takes back what is not committed

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            note(f"teacher.cache: {self._path} {what}")


def _digest(key: bytes, content: bytes) -> bytes:
    """Of an entry, so that neither half of it is another's."""
    return hashlib.sha256(key + content).digest()


def _pieces(keys: list[bytes]) -> Iterator[list[bytes]]:
    for first in range(0, len(keys), AT_ONCE):
        yield keys[first : first + AT_ONCE]


def _apart(a: Sequence[float], b: Sequence[float]) -> float:
    return distance(a, b) if len(a) == len(b) else float("inf")
