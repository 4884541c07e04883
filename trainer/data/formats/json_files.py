"""Rows of JSON files: JSON Lines, or one array; plain or compressed by gzip."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastkl.trainer.data.formats.json_array import entries
from fastkl.trainer.errors import ConfigError

# What a file of another kind begins with, what it is, and what to do.
OTHER_KINDS = {
    b"PAR1": "a Parquet file; let its name end in .parquet",
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it",
}

BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and white space


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows and their names: "file:17" of JSON Lines, "file#17" of one JSON value, which only a `.json` may be."""
    if ".json" not in [suffix.lower() for suffix in path.suffixes[-2:]]:
        return _lines(path)
    if _begins_array(path):
        return _array(path)
    return iter([(f"{path}#1", json.loads(_content(path)))]) if _is_value(path) else _lines(path)


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """The file, without its compression; a ConfigError where it cannot be read or is not JSON."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            start = file.read(max(map(len, OTHER_KINDS)))
            for beginning, kind in OTHER_KINDS.items():
                if start.startswith(beginning):
                    raise ConfigError(f"{path} is not JSON but {kind}")
            file.seek(0)
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is no whole gzip file ({error}); copy it again, or take .gz off its name") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def _content(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


def _split_lines(path: Path) -> Iterator[bytes]:
    with _opened(path) as file:
        for line in file:
            yield from line.splitlines()  # a carriage return alone ends one too


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    is_text = path.suffix.lower() == ".txt"
    for number, line in enumerate(_split_lines(path), start=1):
        if not line.strip():
            continue
        if is_text and not line.lstrip(BLANK).startswith(b"{"):
            raise ConfigError(f"{path} is a text file without JSON; convert it to JSON Lines, an object on each line")
        try:
            row = _parsed(f"{path}:{number}", line)
        except ConfigError as error:
            if number == 1 and _is_whole(_content(path)):
                raise ConfigError(f"{path} is one JSON value over many lines; let its name end in .json") from error
            raise
        yield f"{path}:{number}", row


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        found = entries(io.TextIOWrapper(file, encoding, "surrogatepass"))
        for number in itertools.count(1):
            with _as_json(source := f"{path}#{number}"):
                row = next(found, found)
            if row is found:
                return
            yield source, row


def _begins_array(path: Path) -> bool:
    start = b""
    with _opened(path) as file:
        while not start and (piece := file.read(1 << 10)):
            start = piece.lstrip(BLANK)
    return start.startswith(b"[")


def _is_value(path: Path) -> bool:
    """Whether a file is one JSON value, over one line or many."""
    lines = [*itertools.islice((line for line in _split_lines(path) if line.strip(BLANK)), 2)]
    return not (len(lines) == 2 and _is_whole(lines[0])) and _is_whole(_content(path))


def _is_whole(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(source: str, text: bytes) -> Any:
    with _as_json(source):
        return json.loads(text)


@contextmanager
def _as_json(source: str) -> Iterator[None]:
    """A ConfigError where something is not JSON."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ConfigError(f"{source} is not a JSON object: {error.msg} at {line}column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise ConfigError(f"{source} cannot be read as JSON: {error}") from error
