"""Where prompts come from, and held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class DataConfig:
    """Prompts: a JSONL file or a data set of the `datasets` package.

    Each row has `prompt` (text) or `messages` (a chat), and optionally `answer`, `completion` and `metadata` (an object).

    Args:
        path: JSONL file.
        dataset: Name of a data set for `datasets.load_dataset`, in place of `path`.
        split: Its split.
        chat_template: Wrap a text `prompt` as a user's turn in the tokenizer's chat template.
        max_prompt_tokens: Leave out prompts longer than this; null keeps all.
        limit: Use the first rows only; null uses all.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    chat_template: bool = True
    max_prompt_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} is {value}; it must be at least 1, or null")


@dataclass(frozen=True)
class EvalConfig:
    """Sampled answers to held-out prompts, scored by a named function.

    Args:
        data: Prompts with an `answer` each; without path or dataset there is no evaluation.
        grader: Scores a completion; the names are those of reward.grader, `environment` excepted.
        every: Evaluate each so many steps, and before the first and after the last one; 0: only those two.
        max_new_tokens: Length limit of an answer.
        temperature: 0 is greedy.
        trust_grader: Import and run the Python function that `grader` names. Off unless you say so.
    """

    data: DataConfig = field(default_factory=DataConfig)
    grader: str = "last_number"
    every: int = 0
    max_new_tokens: int = 256
    temperature: float = 0.0
    trust_grader: bool = False

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every is {self.every}; it must be >= 0")
        require(self.max_new_tokens >= 1, f"eval.max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        require(self.temperature >= 0, f"eval.temperature is {self.temperature}; it must be >= 0 (0: greedy)")


def check_source(name: str, data: DataConfig) -> None:
    require(
        (data.path is None) != (data.dataset is None),
        f"{name}.path is {data.path!r} and {name}.dataset is {data.dataset!r}; give exactly one of them",
    )
