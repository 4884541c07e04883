"""A JSON file that is whole at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(file: Path | None, report: dict[str, Any]) -> None:
    """Replaces the file at once, so that at any time it is whole; without one does nothing."""
    if file is None:
        return
    aside = file.with_name(f".{file.name}.new")
    aside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, file)
