"""The least that each command with settings must be given."""

from __future__ import annotations

MINIMAL: dict[str, dict[str, object]] = {
    "distill": {"run": "runs/a", "student.path": "s", "teacher.path": "t", "data.path": "d.jsonl"},
    "sft": {"run": "runs/a", "student.path": "s", "data.path": "d.jsonl"},
    "eval": {"model.path": "m", "eval.data.path": "d.jsonl"},
    "score": {"output": "o.jsonl", "model.path": "m", "data.path": "d.jsonl"},
}
