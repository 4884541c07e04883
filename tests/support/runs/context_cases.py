"""Functions that a config names as `teacher.context.function`, and prompts of teachers without any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from run_settings import config
from tiny_data import write_jsonl
from tiny_models import tokenizer
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.mixture import read_data_sets
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.turns import Turn
from fastkl.trainer.teachers.context.attempts import Attempt
from fastkl.trainer.teachers.context.prompts import TeacherPrompts

HERE = "context_cases"
# Short, for models that read 64 characters.
SIBLING: dict[str, object] = {
    "teacher__context__function": "sibling",
    "teacher__context__sibling__template": "{prompt}{solution}{feedback}",
    "teacher__context__sibling__solution": "={text}",
    "teacher__context__sibling__feedback": " -{text}",
}
# Some of three samples succeed.
GRADED: dict[str, object] = {"reward__grader": "regex:^[0-9a-h]", "sampling__samples_per_prompt": 3}
SAMPLES = GRADED | {"teacher__context__function": f"{HERE}.of_samples", "teacher__context__trust_context": "true"}


def asked(text: str) -> list[Turn]:
    return [{"role": "user", "content": text}]


def as_read(sample: dict[str, Any]) -> dict[str, Any]:
    """A logged sample as its teacher reads it."""
    prompt, begin = sample["teacher_prompt"], len(sample["ids"]) - sample["completion_length"]
    if prompt is None:
        return sample
    ids, mask = prompt + sample["ids"][begin:], [False] * len(prompt) + sample["loss_mask"][begin:]
    return sample | {"ids": ids, "loss_mask": mask}


def of_row(row: Prompt) -> list[Turn]:
    return asked(f"{row.answer} {row.turns[-1]['content']}")


def of_samples(row: Prompt, samples: Sequence[Attempt]) -> list[list[Turn] | None]:
    """The best of the group for those that are worse; the student's prompt for the others."""
    best = max(samples, key=lambda sample: sample.reward or 0.0)
    return [asked(f"{len(best.text)} {row.prompt}") if sample.reward != best.reward else None for sample in samples]


def too_few(row: Prompt, samples: Sequence[Attempt]) -> list[None]:
    return [None]


def far_too_long(row: Prompt, samples: Sequence[Attempt]) -> list[list[Turn]]:
    return [asked("a" * 200) for _ in samples]


def of_changed(row: Prompt) -> list[Turn]:
    row.turns[-1]["content"] += "!"
    row.metadata.clear()
    return row.turns


def of_either(row: Prompt, samples: Sequence[Attempt] = ()) -> list[Turn]:
    return asked("1")


def of_half(row: Prompt) -> list[Turn]:
    return asked("\ud800")


def failing(row: Prompt) -> None:
    raise KeyError("hint")


def of_nothing() -> None: ...


def prompts_of(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    context: dict[str, object],
    words: PreTrainedTokenizerBase | None = None,
    more: dict[str, object] | None = None,
    **data: object,
) -> tuple[list[str], TeacherPrompts]:
    """What the teacher reads of each row, as text; `context` are settings of `teacher.context`, `more` others."""
    words = tokenizer() if words is None else words
    settings = {"run": folder / "run", "student.path": "s", "teacher.path": "t"}
    settings |= {"data.path": write_jsonl(folder / "rows.jsonl", rows)}
    settings |= {f"teacher.context.{name}": value for name, value in context.items()}
    found = config("distill", settings | (more or {}) | {f"data.{name}": value for name, value in data.items()})
    data_sets = read_data_sets(found.data_sets(), words, with_given=found.sampling.on_policy_fraction < 1)
    read = TeacherPrompts(found, data_sets, words)
    return [words.decode(prompt.ids) for prompt in read.data_sets[0].prompts], read
