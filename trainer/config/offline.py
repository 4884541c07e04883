"""What the commands take that train nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.data import DataConfig, EvalConfig, check_source
from fastkl.trainer.config.models import WriterConfig
from fastkl.trainer.config.optim import BatchConfig
from fastkl.trainer.config.rules import at_least, positive, unchanged
from fastkl.trainer.config.sampling import CompletionsConfig, EngineConfig
from fastkl.trainer.config.teacher import TeacherConfig, check_teacher
from fastkl.trainer.config.training import DistillConfig, SftConfig
from fastkl.trainer.errors import require

DeviceName = Literal["a100", "b200", "cpu", "h100", "h200", "l40s", "mi300", "mi325", "rtx4090"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Grading a model's answers.

    Args:
        model: Let this model answer.
        eval: Choose the prompts, which have answers, and the grader.
        sampling: Choose how a model that is loaded here writes.
        output: Write the graded answers to this JSONL file as they come. The same command goes on with a file that it
            began. null: print only the summary.
        seed: Seed the sampling, if eval.temperature is above 0.
    """

    model: WriterConfig = field(default_factory=WriterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sampling: EngineConfig = field(default_factory=EngineConfig)
    output: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.model.check(self.sampling)
        require(
            self.output is None or bool(self.output.strip()),
            "output is empty; name a JSONL file, or unset it",
        )
        check_source("eval.data", self.eval.data)


@dataclass(frozen=True)
class KeepConfig:
    """Which completions are kept, in a file of their own: rejection sampling.

    Args:
        path: Write the kept rows to this JSONL file when all completions are there. null: there is no such file.
        min_score: Keep those that the grader gives at least this score. null: whatever their score.
        per_prompt: Keep at most so many of a prompt, the first ones. null: all.
        distinct: Keep one of those that say the same to a prompt.
        truncated: Keep those too that reached the length limit.
    """

    path: str | None = None
    min_score: float | None = None
    per_prompt: int | None = None
    distinct: bool = False
    truncated: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "keep.", "per_prompt")
        if self.path is None:
            unchanged(self, "keep.", "keep.path is null; name the file to write")
        require(self.path is None or bool(self.path.strip()), "keep.path is empty; name a JSONL file, or unset it")


@dataclass(frozen=True)
class SampleConfig:
    """A model's completions of prompts, in a file that `fastkl sft` reads as it is.

    Args:
        output: Write all completions to this JSONL file as they come. The same command goes on with a file that it began.
        model: Let this model write.
        data: Read the prompts from here. Their other columns are kept.
        sampling: Choose how many completions of a prompt it writes, and how.
        grader: Score completions with this function. Valid names are those of reward.grader, except environment. null:
            grade none.
        trust_grader: Allow the Python function that `grader` names to be imported and run.
        keep: Write some of the completions to a second file.
        seed: Seed the sampling.
    """

    output: str
    model: WriterConfig = field(default_factory=WriterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: CompletionsConfig = field(default_factory=CompletionsConfig)
    grader: str | None = None
    trust_grader: bool = False
    keep: KeepConfig = field(default_factory=KeepConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        self.model.check(self.sampling)
        require(bool(self.output.strip()), "output is empty; name the JSONL file to write")
        check_source("data", self.data)
        if self.grader is None:
            unchanged(self, "", "grader is null; name a grader", ["trust_grader"])
            unchanged(self.keep, "keep.", "grader is null: nothing has a score; name a grader", ["min_score"])
        require(
            self.keep.path is None or os.path.realpath(self.keep.path) != os.path.realpath(self.output),
            f"keep.path is {self.keep.path!r}, and so is output; give the kept rows a file of their own",
        )


@dataclass(frozen=True)
class ScoreConfig:
    """Log-probs of given completions, each with its end-of-sequence token.

    Args:
        model: Let this model score. One behind a server needs `tokenizer`.
        data: Read rows with `prompt` or `messages`, and `completion`.
        output: Write this JSONL file as the scores come. The same command goes on with a file that it began.
        temperature: Give the log-probs at this temperature.
        batch: Lay out a forward pass like this.
    """

    output: str
    model: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    temperature: float = 1.0
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        require(
            self.model.self is None,
            f"model.self is {self.model.self}, but there is no student here; give model.path",
        )
        check_teacher("model", self.model)
        require(
            not self.model.own_tokenizer,
            f"model.tokenizer is {self.model.tokenizer}, but there is no student here: completions are encoded by the "
            f"model's tokenizer anyway; unset it, or name the folder alone",
        )
        require(
            bool(self.model.path or self.model.tokenizer),
            f"model.tokenizer is {self.model.tokenizer!r} and model.server.url is {self.model.server.url!r}, but the "
            f"completions are encoded here; give the tokenizer's folder or Hub id",
        )
        require(bool(self.output.strip()), "output is empty; name the JSONL file to write")
        positive(self, "", "temperature")
        check_source("data", self.data)


@dataclass(frozen=True)
class InitConfig:
    """A first config, printed.

    Args:
        student: Train this model: a folder or a Hub id.
        teacher: Let this model score: a folder, a Hub id, or the address of a vLLM server.
        data: Read prompts from this JSONL file, or from this data set of the Hub.
        chat: Wrap prompts in the student's chat template.
    """

    student: str
    teacher: str
    data: str
    chat: bool = False


@dataclass(frozen=True)
class ReportConfig:
    """A page about one run, or about several on the same axes.

    Args:
        runs: Show the runs in these folders.
        output: Write this HTML file; an older report is replaced. null: report.html in the folder of the one run.
    """

    runs: list[str]
    output: str | None = None

    def __post_init__(self) -> None:
        require(all(run.strip() for run in self.runs), "RUN is empty; name a run folder")
        require(self.output is None or bool(self.output.strip()), "output is empty; name the page to write")
        require(
            self.output is not None or len(self.runs) == 1,
            f"output is not set and there are {len(self.runs)} runs; name the page to write with --output FILE",
        )


@dataclass(frozen=True)
class Assumptions:
    """The devices of a run that is planned, and how it uses them.

    Args:
        processes: Plan for this many, one on each device. null: num_processes of the accelerate file, or 1.
        accelerate: Take from this file of accelerate whether FSDP 2 shards the student (recipes/accelerate). null: DDP.
        device: Plan for this kind of device. Its numbers are those of its datasheet. A cpu has none: no hours then.
        memory: Let a device have this many GiB. null: 95 % of the datasheet's GB; of a cpu, what this machine has.
        flops_share: Assume that products reach this share of the datasheet's FLOP/s.
        bandwidth_share: Assume that decoding reaches this share of the datasheet's bandwidth.
        prompt_tokens: Assume prompts of this length where the data are not here. null: data.max_prompt_tokens, or 512.
        mean_tokens: Assume completions of this length for FLOPs and hours. Memory is always that of full length. null:
            sampling.max_new_tokens, or for fastkl sft 512 where the data are not here.
    """

    processes: int | None = None
    accelerate: str | None = None
    device: DeviceName = "h200"
    memory: float | None = None
    flops_share: float = 0.4
    bandwidth_share: float = 0.6
    prompt_tokens: int | None = None
    mean_tokens: int | None = None

    def check(self) -> None:
        """Refuses what cannot be."""
        at_least(1, self, "", "processes", "prompt_tokens", "mean_tokens")
        positive(self, "", "flops_share", "bandwidth_share")
        for name in ("flops_share", "bandwidth_share"):
            value = getattr(self, name)
            require(value <= 1, f"{name} is {value}; a share is at most 1")
        require(self.memory is None or self.memory > 0, f"memory is {self.memory}; give GiB above 0, or null")


@dataclass(frozen=True)
class DistillPlan(Assumptions, DistillConfig):
    """What a distillation takes: memory by phase, FLOPs, hours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()


@dataclass(frozen=True)
class ProbeConfig(DistillConfig):
    """What a distillation would find: student and teacher on some prompts, before anything is trained.

    Args:
        prompts: Sample this many of the prompts.
        top: Compare this many of the likeliest tokens, where all teachers have the student's tokenizer.
        json: Print what was found as JSON in place of the table.
        output: Write what was found to this JSON file. null: only print it.
    """

    prompts: int = 64
    top: int = 20
    json: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "", "prompts", "top")
        require(self.output is None or bool(self.output.strip()), "output is empty; name a JSON file, or unset it")
        require(
            self.has_teacher,
            "the config has no teacher, and fastkl probe compares a student with one; give teacher.path or "
            "teacher.server.url, or take `fastkl eval` for a student alone",
        )


@dataclass(frozen=True)
class SftPlan(Assumptions, SftConfig):
    """What supervised fine-tuning takes: memory by phase, FLOPs, hours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
