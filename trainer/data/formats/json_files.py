"""Rows of JSON files: JSON Lines, or one array; plain or compressed by gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastkl.trainer.errors import ConfigError

# What a file of another kind begins with, what it is, and what to do.
OTHER_KINDS = {
    b"PAR1": "a Parquet file; let its name end in .parquet",
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"PK\x03\x04": "a ZIP archive; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; unpack it",
}


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows and their names: "file:17" of JSON Lines, "file#17" of one JSON value, which only a `.json` may be."""
    content = _bytes(path)
    if ".json" not in [suffix.lower() for suffix in path.suffixes[-2:]]:
        return _lines(path, content)
    if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return _array(path, _parsed(str(path), content))
    return _array(path, [json.loads(content)]) if _is_whole(content) else _lines(path, content)


def _bytes(path: Path) -> bytes:
    compressed = path.suffix.lower() == ".gz"
    try:
        content = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is no whole gzip file ({error}); copy it again, or take .gz off its name") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    for beginning, kind in OTHER_KINDS.items():
        if content.startswith(beginning):
            raise ConfigError(f"{path} is not JSON but {kind}")
    return content


def _lines(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    beginning = content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if path.suffix.lower() == ".txt" and beginning not in (b"", b"{"):
        raise ConfigError(f"{path} is a text file without JSON; convert it to JSON Lines, an object on each line")
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(f"{path}:{number}", line)
        except ConfigError as error:
            if number == 1 and _is_whole(content):
                raise ConfigError(f"{path} is one JSON value over many lines; let its name end in .json") from error
            raise
        yield f"{path}:{number}", row


def _array(path: Path, rows: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path}#{number}", row) for number, row in enumerate(rows, start=1))


def _is_whole(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(source: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not a JSON object: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise ConfigError(f"{source} cannot be read as JSON: {error}") from error
