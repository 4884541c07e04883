"""What the commands take that train nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastkl.trainer.config.data import DataConfig, EvalConfig, check_source
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.config.optim import BatchConfig
from fastkl.trainer.config.teacher import TeacherConfig, check_teacher
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class EvaluateConfig:
    """Grading a model's answers.

    Args:
        model: The model that answers.
        eval: Prompts with answers, and the grader.
        output: JSONL file for the graded answers; it must not exist. null: only the summary is printed.
        seed: Seed of sampling, where eval.temperature is above 0.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.model.path), "model.path is empty; give a model folder or a Hub id")
        check_source("eval.data", self.eval.data)


@dataclass(frozen=True)
class ScoreConfig:
    """Log-probs of given completions, each with its end-of-sequence token.

    Args:
        model: The model that scores; a served one needs `tokenizer`.
        data: Rows with `prompt` or `messages`, and `completion`.
        output: JSONL file to write; it must not exist.
        temperature: The log-probs are those at this temperature.
        batch: Layout of a forward pass.
    """

    output: str
    model: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    temperature: float = 1.0
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        require(
            not self.model.base_of_student,
            "model.base_of_student is true, but there is no student here; give model.path",
        )
        check_teacher("model", self.model)
        require(
            bool(self.model.path or self.model.tokenizer),
            f"model.tokenizer is {self.model.tokenizer!r} and model.server.url is {self.model.server.url!r}; give the "
            f"tokenizer's folder or Hub id: the completions are encoded here",
        )
        require(bool(self.output), "output is empty; name the JSONL file to write")
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be > 0")
        check_source("data", self.data)


@dataclass(frozen=True)
class ReportConfig:
    """A page about one run, or about several on the same axes.

    Args:
        runs: Run folders.
        output: HTML file to write, in place of an older report if need be; null: report.html in the one run's folder.
    """

    runs: list[str]
    output: str | None = None

    def __post_init__(self) -> None:
        require(
            self.output is not None or len(self.runs) == 1,
            f"output is not set and there are {len(self.runs)} runs; name the page to write with --output FILE",
        )
