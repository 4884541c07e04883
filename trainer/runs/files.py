"""Files that are never left half-written, and never overwritten unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastkl.trainer.errors import ConfigError


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


def new_file(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise ConfigError(f"output {path} exists already; move it away or choose another name")
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
