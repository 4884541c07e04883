"""Where prompts come from, and held-out ones."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.errors import require

COLUMNS = ("prompt", "messages", "completion", "truncated", "answer", "metadata", "tools")  # what a row may have
BESIDE = ("source", "set", "temperature", "sample", "score", "tokens")  # what `fastkl eval` and `sample` write as well


@dataclass(frozen=True)
class DataConfig:
    """Prompts: a file, a folder or a data set of the `datasets` package (docs/data/data.md).

    Each row has `prompt` (text) or `messages` (a chat), and optionally `answer`, `completion`, `tools` and `metadata` (an
    object).

    Args:
        path: Read prompts from this file (JSON Lines, a JSON array, Parquet), from a folder of such files, or from a folder
            that `save_to_disk` wrote.
        dataset: Load this data set with `datasets.load_dataset` instead of `path`.
        name: Use this config of the data set, for example main. null: the only one.
        split: Use this split of the data set.
        columns: Read columns under other names, ours first: {prompt: question}.
        chat_template: Wrap a text `prompt` as a user's turn in the tokenizer's chat template.
        template_kwargs: Pass these variables to the chat template, for example {enable_thinking: false}.
        max_prompt_tokens: Leave out longer prompts. null: keep all.
        offset: Skip the first rows, this many.
        limit: Use only the first rows after these, this many. null: use all.
    """

    path: str | None = None
    dataset: str | None = None
    name: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    chat_template: bool = True
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    offset: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "data.", "offset")
        at_least(1, self, "data.", "max_prompt_tokens", "limit")
        require(
            self.name is None or self.dataset is not None,
            f"data.name is {self.name!r}, which is a config of a data set, but data.dataset is null; unset data.name",
        )
        for ours in self.columns:
            require(ours in COLUMNS, f"data.columns has {ours!r}; rows have the columns {', '.join(COLUMNS)}")


@dataclass(frozen=True)
class EvalSetConfig:
    """One more set of held-out prompts.

    Args:
        data: Read its prompts from here, with an `answer` each.
        grader: Score its completions with this function. null: with eval.grader.
        max_new_tokens: Limit the length of an answer. null: to eval.max_new_tokens.
        trust_grader: Allow the Python function that `grader` names to be imported and run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    grader: str | None = None
    max_new_tokens: int | None = None
    trust_grader: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "eval.more.", "max_new_tokens")
        if self.grader is None:
            unchanged(self, "eval.more.", "it names no grader of its own; unset one of them", ["trust_grader"])


@dataclass(frozen=True)
class EvalConfig:
    """Answers to held-out prompts, scored by a named function (docs/data/evaluation.md).

    Args:
        data: Read prompts with an `answer` each. Without path or dataset there is no evaluation.
        more: Evaluate on these sets of prompts too: by name, each with its data, and a grader and a limit of its own if
            need be.
        grader: Score completions with this function. Valid names are those of reward.grader, except environment.
        every: Evaluate every N steps, and always before the first and after the last step. 0: only those two.
        max_new_tokens: Limit the length of an answer.
        temperature: Sample answers at this temperature, or at each of these: [0, 1]. 0: greedy.
        samples_per_prompt: Answer each prompt this many times, for the mean and for pass@k. Greedy answers are all alike:
            there is always one.
        trust_grader: Allow the Python function that `grader` names to be imported and run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    more: dict[str, EvalSetConfig] = field(default_factory=dict)
    grader: str = "last_number"
    every: int = 0
    max_new_tokens: int = 256
    temperature: float | list[float] = 0.0
    samples_per_prompt: int = 1
    trust_grader: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, "eval.", "every")
        at_least(1, self, "eval.", "max_new_tokens", "samples_per_prompt")
        self._check_temperatures()
        for name, one in self.more.items():
            check_name("eval.more", name)
            check_source(f"eval.more.{name}.data", one.data)
        require(
            not self.more or bool(self.sets()),
            f"eval.more has {', '.join(self.more)}, but eval.data names no prompts; make one of them eval.data",
        )

    def _check_temperatures(self) -> None:
        given = f"eval.temperature is {self.temperature}"
        require(self.temperatures != [], f"{given}; give a number, or a list of some")
        require(
            all(0 <= temperature < float("inf") for temperature in self.temperatures),
            f"{given}; it must be at least 0 and finite",
        )
        require(
            len({f"{temperature:g}" for temperature in self.temperatures}) == len(self.temperatures),
            f"{given}, which has one twice; leave it out",
        )
        require(
            self.samples_per_prompt == 1 or any(self.temperatures),
            f"eval.samples_per_prompt is {self.samples_per_prompt} and {given}: greedy answers are all alike; raise the "
            f"temperature, or unset eval.samples_per_prompt",
        )

    @property
    def temperatures(self) -> list[float]:
        return self.temperature if isinstance(self.temperature, list) else [self.temperature]

    def sets(self) -> dict[str, EvalSetConfig]:
        """The sets by name, that of `data` first, under ""; empty where there are none. Graders and limits may be null."""
        if self.data.path is None and self.data.dataset is None:
            return {}
        return {"": EvalSetConfig(self.data, self.grader, self.max_new_tokens, self.trust_grader), **self.more}


def check_name(setting: str, name: str) -> None:
    """A data set's name becomes part of a metric's."""
    require(
        re.fullmatch(r"[\w-]+", name) is not None,
        f"{setting} has a data set {name!r}, and its name becomes that of a metric; use only letters, digits, _ and -",
    )


def check_source(name: str, data: DataConfig) -> None:
    require(
        (data.path is None) != (data.dataset is None),
        f"{name}.path is {data.path!r} and {name}.dataset is {data.dataset!r}; give exactly one of them",
    )
