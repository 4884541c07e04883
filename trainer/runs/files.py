"""Files that are never left half-written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a log; none if there is no file. A line that is no object is none of them."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # splitlines() also cuts at U+2028
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short by a crash; the step is run again
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once: readers see the old text or the new one."""
    aside = path.with_name(f".{path.name}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
