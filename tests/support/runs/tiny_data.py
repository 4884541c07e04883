"""Rows in files, and folders with tiny models and a dozen sums."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tiny_models import save_model


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sums(count: int = 12) -> list[dict[str, object]]:
    """Prompts of different lengths, with an answer and a completion each."""
    return [
        {"prompt": f"{i}+{i * i}=", "answer": str(i + i * i), "completion": f"{i + i * i}"} for i in range(1, count + 1)
    ]


def model_and_sums(folder: Path, name: str, **settings: Any) -> Path:
    """A folder with a model called `name` and a dozen sums to complete."""
    save_model(folder / name, **settings)
    write_jsonl(folder / "sums.jsonl", sums())
    return folder


def pair_and_sums(folder: Path, **student: Any) -> Path:
    """A folder with a student, a teacher and a dozen sums."""
    save_model(folder / "teacher", seed=1)
    return model_and_sums(folder, "student", **student)
