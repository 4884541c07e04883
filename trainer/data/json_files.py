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
    """Rows and their names: "file:17" of JSON Lines, "file#17" of an array. An array is looked for in `.json` alone."""
    content = _bytes(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if ".json" in suffixes[-2:] and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _array(path, content)
    else:
        yield from _lines(path, content)


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
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            yield f"{path}:{number}", _parsed(f"{path}:{number}", line)


def _array(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    rows = _parsed(str(path), content)
    for number, row in enumerate(rows, start=1):
        yield f"{path}#{number}", row


def _parsed(source: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not a JSON object: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # brackets or digits without end
        raise ConfigError(f"{source} cannot be read as JSON: {error}") from error
