"""What an objective is: how a step's samples are made ready, and what the student minimises on a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fastkl.loss import LossOutput
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.flops import Cost, scoring_flops
from fastkl.trainer.objectives.weights.step import needs_entropies_first
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists


class Objective(Protocol):
    """Makes samples ready and gives the loss of a batch. Subclass it; `registry.OBJECTIVES` is where it gets its name."""

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> dict[str, float]:
        """Writes into this process's samples what the loss needs of them, before the update. All processes call it.

        Returns metrics of the whole step, the same on all processes.
        """
        return {}

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """The samples apart by what cannot share a batch."""
        return [samples]

    def updating(self) -> AbstractContextManager[None]:
        """A context that is open during the update; entered and left by all processes together."""
        return nullcontext()

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        """The sum over the batch's tokens, each times its weight, divided by `normalizer` (`Batch.parts`).

        Args:
            model: A fused one (`fastkl.head.fuse`), or what it became: `model(fused=function, **inputs)`.
            normalizer: The weights of the tokens of the optimizer step together, on all processes; without weights, how
                many tokens there are.
            seed: That of a sparse backward.
        """
        ...

    def updated(self, samples: list[Sample]) -> dict[str, float]:
        """Sees this process's samples of a step after its update, with what was scattered. All processes call it.

        Returns metrics of the whole step, the same on all processes.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, the same on every process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave, of this objective or another one."""
        return

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        """FLOPs of the student in `prepare`."""
        return 0.0

    @staticmethod
    def teacher_passes(config: LossConfig) -> int:
        """How often the teacher reads a sample for its score."""
        return 1

    @staticmethod
    def lists(config: LossConfig) -> Lists:
        """What the teacher is asked for at each place, beside the log-prob of the token."""
        return Lists()


def score_by_teacher(teachers: RoutedTeacher[Any], samples: list[Sample], clock: Clock) -> None:
    """Writes the teachers' log-probs (and likeliest tokens, if they were asked for them) into this process's samples."""
    with clock("teacher"), teachers.ready():
        processes.raise_together(lambda: teachers.score(samples))


def measure_entropies(
    student: Student, samples: list[Sample], loss: LossConfig, temperature: float, clock: Clock
) -> None:
    """Writes the student's entropies into this process's samples, if `loss.weights` are made of them."""
    if needs_entropies_first(loss):
        with clock("old_logprobs"):
            student.measure_entropies(samples, temperature)


def measuring_flops(loss: LossConfig, cost: Cost, samples: list[Sample]) -> float:
    """FLOPs of `measure_entropies`."""
    return scoring_flops(cost, samples) if needs_entropies_first(loss) else 0.0
