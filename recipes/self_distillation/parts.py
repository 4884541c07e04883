"""The two contexts that a model learns to do without: a rule of its system prompt, and solved examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rules import GRADED_ABOUT, LEARNED_ABOUT, questions
from spanish import is_spanish
from tasks import is_right, parts_of_kind

from fastkl.trainer.commands.command_line import parse

HERE, RUNS = Path(__file__).parent, Path("runs/self_distillation")
Row = dict[str, Any]
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Part:
    """A context, what is learned with it and how that is graded."""

    name: str
    learned: list[Row]
    graded: list[Row]
    examples: list[Row]
    does: Callable[[str, Row], bool]
    max_new_tokens: int  # in grading

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def yaml(self) -> Path:
        return HERE / f"{self.name}.yaml"

    @cached_property
    def config(self) -> Any:
        return parse(["distill", str(self.yaml)])[1]

    def chat(self, row: Row, *, prompted: bool) -> Chat:
        """What the teacher reads where `prompted`, else what the student reads."""
        turns = []
        if prompted:
            system = self.config.teacher.context.system
            turns += [("system", system)] if system else []
            for example in self.examples:
                turns += [("user", example["prompt"]), ("assistant", example["completion"])]
        return chat_of([*turns, ("user", row["prompt"])])


def parts() -> dict[str, Part]:
    examples, learned, graded = parts_of_kind()
    rule = Part(
        "rule",
        list(questions(LEARNED_ABOUT)),
        list(questions(GRADED_ABOUT)),
        [],
        lambda text, row: is_spanish(text, row["prompt"]),
        24,
    )
    # A row's own completion is the right answer: nobody who learns may see it.
    unsolved = [{"prompt": row["prompt"], "answer": row["answer"]} for row in learned]
    task = Part("examples", unsolved, graded, examples, lambda text, row: is_right(text, row["answer"]), 6)
    return {part.name: part for part in (rule, task)}


def chat_of(turns: Sequence[tuple[str, str]]) -> Chat:
    return [{"role": role, "content": content} for role, content in turns]
