"""What a training run is made of. Every field can be set in the YAML file or on the command line (`--optim.lr 1e-4`)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.cross_checks import (
    check_own_tokenizers,
    check_rollouts,
    check_servers,
    check_without_teacher,
)
from fastkl.trainer.config.data import DataConfig, EvalConfig
from fastkl.trainer.config.guards import GuardsConfig
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.mixture import DataSetConfig, TaughtConfig, check_common_teacher, check_data_sets
from fastkl.trainer.config.models import StudentConfig
from fastkl.trainer.config.optim import BatchConfig, CheckpointConfig, OptimConfig
from fastkl.trainer.config.reward import EnvironmentConfig, RewardConfig
from fastkl.trainer.config.rules import at_least
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.config.teacher import (
    ReferenceConfig,
    TeacherConfig,
    check_loss,
    check_reference,
    check_self_of,
    check_teacher,
)
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class RunConfig:
    """What every training run has.

    Args:
        run: Keep the run in this folder. The same config resumes in it; another one is refused (see resume).
        seed: Seed the order of the prompts, the sampling and the initialisation.
        student: Train this model.
        data: Read the prompts from here.
        optim: Set the optimizer and its schedule.
        batch: Lay out a forward pass like this.
        eval: Evaluate on held-out prompts.
        checkpoint: Write checkpoints.
        guards: Watch the run.
        mixed_precision: Run the forward pass under autocast (accelerate's option).
        trackers: Log to these trackers of accelerate, besides metrics.jsonl. For example [tensorboard, wandb].
        log_samples: Write this many samples of each step to samples.jsonl. Distillation adds the ranks of their tokens.
        push_to_hub: Upload the student to this repository of the Hub at the end, USER/NAME. null: upload nothing.
        push_private: Make that repository a private one, where it is not there yet.
        resume: Refuse settings that change what the run computes (same), or go on with them from the last checkpoint
            (change). Student, teacher, reference, data, environment and seed never change.
    """

    run: str
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    trackers: list[str] = field(default_factory=list)
    log_samples: int = 4
    push_to_hub: str | None = None
    push_private: bool = True
    resume: Literal["same", "change"] = "same"

    def __post_init__(self) -> None:
        require(bool(self.run.strip()), "run is empty; name the run folder, for example runs/first")
        require(bool(self.student.path.strip()), "student.path is empty; give a model folder or a Hub id")
        at_least(0, self, "", "log_samples")
        require(
            self.checkpoint.best is None or self.eval.data.path is not None or self.eval.data.dataset is not None,
            f"checkpoint.best is {self.checkpoint.best}, but nothing is evaluated; set eval.data.path, or unset "
            f"checkpoint.best",
        )
        require(
            self.push_to_hub is None or re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub) is not None,
            f"push_to_hub is {self.push_to_hub!r}; name a repository of the Hub, USER/NAME",
        )


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """On-policy distillation: the student samples, the teacher scores, the student learns from the reverse KL.

    Args:
        teacher: Let this model score the student's tokens. It is never trained.
        reference: Compare with this model too, for loss.extrapolate.
        mixture: Train on several data sets instead of `data`: by name, each with its prompts, weight and teacher.
        sampling: Let the student sample like this.
        loss: Choose what the student minimises.
        reward: Add a score of whole samples to the KL. With loss.kl_coef 0 there is no KL, and no teacher is needed.
        environment: Let this answer the student between its turns.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    mixture: dict[str, TaughtConfig] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    @property
    def has_teacher(self) -> bool:
        needed = (self.loss.kl_coef > 0 or self.loss.redistribute > 0) and self.loss.control != "no_teacher"
        return needed or any(teacher != TeacherConfig() for teacher in self.teachers().values())

    @property
    def learns_otherwise(self) -> bool:
        """Whether rewards, a reference or the likelihood of given completions teach even where teachers agree."""
        given = self.sampling.on_policy_fraction < 1 and self.loss.objective == "policy_gradient"
        return self.reward.pays or bool(self.reference.path) or given

    def __post_init__(self) -> None:
        super().__post_init__()
        contexts = {f"{name}.context": teacher.context for name, teacher in self.teachers().items()}
        check_rollouts(self.sampling, self.loss, self.reward, self.environment, contexts)
        check_data_sets(self.mixture, self.data)
        check_common_teacher(self.mixture, self.teacher)
        if self.has_teacher:
            check_servers(self.sampling, self.teachers(), self.student.lora.rank)
            self._check_teachers()
        else:
            check_without_teacher(self.loss)
        check_reference(self.reference, self.loss, self.student)
        check_own_tokenizers(self.teachers() if self.has_teacher else {}, self.loss)
        require(
            self.environment.role is None or all(entry.data.chat_template for entry in self.data_sets().values()),
            f"environment.role is {self.environment.role!r}, but data.chat_template is false: a text has no turns. Set "
            f"environment.role to null or data.chat_template to true",
        )
        require(
            self.sampling.dtype != self.student.dtype,
            f"sampling.dtype is {self.sampling.dtype} and so is student.dtype: the copy would be the same; unset "
            f"sampling.dtype",
        )
        transfer, rank = self.sampling.server.transfer, self.student.lora.rank
        require(
            transfer is None or rank == 0,
            f"sampling.server.transfer is {transfer} and student.lora.rank is {rank}: vLLM loads an adapter from a folder; "
            f"unset sampling.server.transfer",
        )
        samples = self.sampling.samples_per_step
        require(
            samples >= self.optim.substeps,
            f"optim.substeps is {self.optim.substeps}, more than the {samples} samples of a step; raise "
            f"sampling.prompts_per_step or lower optim.substeps",
        )

    def _check_teachers(self) -> None:
        for name, teacher in self.teachers().items():
            check_teacher(name, teacher)
            check_loss(name, teacher, self.loss)
            check_self_of(name, teacher, self.student)
            if teacher.self != "live" or teacher.context != ContextConfig():
                continue
            require(
                self.reward.pays,
                f"{name}.self is live: the teacher is the student as it is and reads the same prompt, so that its KL is 0 "
                f"under every objective; give it a prompt of its own ({name}.context), name a reward.grader, or set "
                f"{name}.self to ema, synced or base, or {name}.path",
            )
            require(
                self.loss.redistribute == 0,
                f"{name}.self is live: the teacher finds every token as likely as the student does, and loss.redistribute "
                f"({self.loss.redistribute}) would weigh all of them alike; give it a prompt of its own ({name}.context) "
                f"or unset one of them",
            )

    def data_sets(self) -> dict[str, TaughtConfig]:
        """The mixture by name, or the one data set under the name ""; each with its teacher."""
        if not self.mixture:
            return {"": TaughtConfig(self.data, teacher=self.teacher)}
        return {
            name: dataclasses.replace(entry, teacher=entry.teacher or self.teacher)
            for name, entry in sorted(self.mixture.items())
        }

    def teacher_setting(self, data_set: str) -> str:
        """The name of the settings of a data set's teacher: `teacher`, `mixture.math.teacher`."""
        entry = self.mixture.get(data_set)
        return "teacher" if entry is None or entry.teacher is None else f"mixture.{data_set}.teacher"

    def teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by the name of their settings: `teacher`, `mixture.math.teacher`."""
        entries = {f"mixture.{name}.teacher": entry.teacher for name, entry in sorted(self.mixture.items())}
        teachers = {name: teacher for name, teacher in entries.items() if teacher is not None}
        needs_common = not self.mixture or len(teachers) < len(entries)
        return {"teacher": self.teacher, **teachers} if needs_common else teachers


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning on given completions: the off-policy stage before distillation.

    Args:
        mixture: Train on several data sets instead of `data`: by name, each with its rows and its weight.
        examples_per_step: Take this many examples in a step.
    """

    mixture: dict[str, DataSetConfig] = field(default_factory=dict)
    examples_per_step: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_data_sets(self.mixture, self.data)
        require(
            self.examples_per_step >= self.optim.substeps,
            f"examples_per_step is {self.examples_per_step}, less than optim.substeps ({self.optim.substeps}); raise it or "
            f"lower optim.substeps",
        )

    def data_sets(self) -> dict[str, DataSetConfig]:
        """The mixture by name, or the one data set under the name ""."""
        return dict(sorted(self.mixture.items())) or {"": DataSetConfig(self.data)}


def as_dict(config: RunConfig) -> dict[str, Any]:
    """A config as the plain dictionary that config.yaml holds."""
    return dataclasses.asdict(config)
