"""A folder that was written whole, and stays so: on the disk before it gets its name, with a checksum of each file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

NAME = "checksums.json"
_CHUNK = 1 << 24


class Damaged(Exception):
    """What is wrong with a sealed folder."""


def seal(folder: Path) -> None:
    """Writes the checksums, and has everything written to the disk itself: a power cut leaves all of it or no name."""
    sums = {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in sorted(folder.iterdir())}
    (folder / NAME).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def check_seal(folder: Path, files: Iterable[str] = ()) -> None:
    """Raises Damaged unless every file is as it was sealed, and all of `files` are among them."""
    try:
        sums = json.loads((folder / NAME).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in sums.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"{NAME} is missing or cannot be read") from error
    if not expected or not {*files} <= expected.keys():
        raise Damaged(f"{NAME} does not name every file")
    for name, (size, checksum) in expected.items():
        path = folder / name
        try:
            found = path.stat().st_size
            same = found == size and _crc32(path) == checksum
        except OSError as error:
            raise Damaged(f"{name} cannot be read: {error.strerror}") from error
        if found != size:
            raise Damaged(f"{name} has {found} of {size} bytes")
        if not same:
            raise Damaged(f"{name} has other bytes than were written")


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
