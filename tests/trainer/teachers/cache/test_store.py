"""The file that scores are kept in: whole entries or none, whatever happens to its writers and to its bytes."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.cache.store import NAME, Store

MOST = 1e9
WRITER = """
import sys
from pathlib import Path
from fastkl.trainer.teachers.cache.store import Store
store, who = Store(Path(sys.argv[1]), 1e9), int(sys.argv[2])
print("open", flush=True)
for turn in range(int(sys.argv[3])):
    own = {bytes([who, turn % 256, place]): bytes([who, turn % 256, place]) * 400 for place in range(50)}
    store.put(own)
    assert store.get(own) == own
"""


def writing(folder: Path, who: int, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(who), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def rows(folder: Path) -> dict[bytes, bytes]:
    connection = sqlite3.connect(folder / NAME)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return dict(connection.execute("SELECT key, content FROM scores"))
    finally:
        connection.close()


def change(folder: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(folder / NAME) as connection:
        connection.execute(statement, values)
    connection.close()


def test_what_is_put_is_got(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path / "a" / "b", MOST)
    put = {bytes([n % 256, n // 256]): os.urandom(n) for n in range(1200)}
    store.put(put)
    assert store.get([*put, b"other"]) == put
    store.put({b"\0\0": b"new"})
    assert Store(tmp_path / "a" / "b", MOST).get([b"\0\0", b"\1\0"]) == {b"\0\0": b"new", b"\1\0": put[b"\1\0"]}
    assert store.get([]) == {}
    assert capsys.readouterr().err == ""


def test_a_writer_that_is_killed_leaves_whole_pieces(tmp_path: Path) -> None:
    for who in range(3):
        writer = writing(tmp_path, who, 10**6)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        time.sleep(0.03 * (who + 1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    found = rows(tmp_path)
    assert all(content == key * 400 for key, content in found.items())
    assert len(found) % 50 == 0
    assert found
    store = Store(tmp_path, MOST)
    assert store.get(found) == found
    store.put({b"after": b"wards"})
    assert store.get([b"after"]) == {b"after": b"wards"}


def test_processes_share_a_folder(tmp_path: Path) -> None:
    writers = [writing(tmp_path, who, 20) for who in range(3)]
    assert [writer.communicate()[1] for writer in writers] == [""] * 3
    assert len(rows(tmp_path)) == 3 * 20 * 50


DAMAGE = {
    "content": ("UPDATE scores SET content = x'00' WHERE key = ?", [b"a"]),
    "another's": ("UPDATE scores SET content = (SELECT content FROM scores WHERE key = ?) WHERE key = ?", [b"b", b"a"]),
    "digest": ("UPDATE scores SET digest = x'' WHERE key = ?", [b"a"]),
    "row": (
        "UPDATE scores SET (digest, content) = (SELECT digest, content FROM scores WHERE key = ?) WHERE key = ?",
        [b"b", b"a"],
    ),
}


@pytest.mark.parametrize(("statement", "values"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_missing(
    tmp_path: Path, statement: str, values: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, MOST)
    store.put({b"a": b"one", b"b": b"two"})
    change(tmp_path, statement, *values)
    for _ in range(2):
        assert store.get([b"a", b"b"]) == {b"b": b"two"}
    said = capsys.readouterr().err
    assert said == f"fastkl: teacher.cache: {tmp_path / NAME} has damaged entries: those scores are computed again\n"
    store.put({b"a": b"one"})
    assert store.get([b"a"]) == {b"a": b"one"}


def test_a_file_that_is_no_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / NAME).write_bytes(b"no database " * 1000)
    store = Store(tmp_path, MOST)
    assert f"{tmp_path / NAME} is damaged (file is not a database): nothing is read" in capsys.readouterr().err
    store.put({b"a": b"one"})
    assert store.get([b"a"]) == {}
    assert store.identity("server", [0.0], 1.0, lambda: "fresh") == "fresh"


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_a_file_that_was_cut(tmp_path: Path, kept: float, capsys: pytest.CaptureFixture[str]) -> None:
    put = {bytes([n]): bytes([n]) * 5000 for n in range(100)}
    Store(tmp_path, MOST).put(put)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[: int(kept * len(content))])
    store = Store(tmp_path, MOST)
    for key, wanted in put.items():
        assert store.get([key]).get(key, wanted) == wanted
    store.put(put)
    assert str(tmp_path / NAME) in capsys.readouterr().err


def test_the_first_are_forgotten(tmp_path: Path) -> None:
    store, most = Store(tmp_path, 2e5), 2e5
    put = [{bytes([turn, n]): os.urandom(1000) for n in range(10)} for turn in range(60)]
    for some in put:
        store.put(some)
    found = [store.get(some) == some for some in put]
    assert not found[0]
    assert all(found[-10:])
    assert found == sorted(found)
    assert (tmp_path / NAME).stat().st_size < 1.2 * most
    Store(tmp_path, 5e4).put({b"last": b"one"})
    assert sum(store.get(some) == some for some in put) < 5


def test_a_full_disk_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, MOST)
    connect = sqlite3.connect

    def small(*args: object, **settings: object) -> sqlite3.Connection:
        connection = connect(*args, **settings)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 8")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    for _ in range(2):
        store.put({bytes([n]): bytes(5000) for n in range(20)})
    assert store.get([b"\0"]) == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written (database or disk is full)" in said


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"teacher.cache: .*file/scores.sqlite cannot be written .*name another folder"
    ):
        Store(tmp_path / "file", MOST)


def test_servers_are_known_by_what_they_say_and_by_a_text(tmp_path: Path) -> None:
    names = iter("abcdef")
    first, near, far = [-1.0, -2.0], [-1.01, -2.01], [-1.5, -2.0]
    asked = [("one", first), ("one", near), ("one", far), ("two", first), ("one", first), ("one", [-1.0])]
    found = [Store(tmp_path, MOST).identity(*about, 0.02, lambda: next(names)) for about in asked]
    assert found == ["a", "a", "b", "c", "a", "d"]
