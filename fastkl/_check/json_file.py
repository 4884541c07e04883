"""A JSON file that is whole at any time."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def write_json(file: Path | None, report: dict[str, Any]) -> None:
    """Replaces the file at once, so that at any time it is whole; without one does nothing."""
    if file is None:
        return
    aside = _aside(file)
    aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, file)


def writable(text: str) -> Path:
    """An argument's file that `write_json` can replace: refused before anything is measured, not after."""
    file, folder = Path(text), Path(text).absolute().parent
    if file.exists() and not file.is_file():
        raise argparse.ArgumentTypeError(f"{file} is no file; name one that may be replaced")
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {folder} does not exist; create it first")
    try:
        _aside(file).touch()
        _aside(file).unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{folder} takes no files ({error.strerror}); name another folder") from None
    return file


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.new")
