"""What an objective is: how a step's samples are made ready, and what the student minimises on a batch of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fastkl.loss import LossOutput
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.flops import Cost
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher


class Objective(Protocol):
    """Makes samples ready and gives the loss of a batch. Subclass it; `registry.OBJECTIVES` is where it gets its name."""

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> None:
        """Writes into this process's samples what the loss needs of them, before the update. All processes call it."""

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        """The samples apart by what cannot share a batch."""
        return [samples]

    def updating(self) -> AbstractContextManager[None]:
        """A context that is open during the update; entered and left by all processes together."""
        return nullcontext()

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        """The sum over the batch's tokens, divided by `normalizer`.

        What it scatters into the batch's samples reaches all processes after the update.

        Args:
            model: A fused one (`fastkl.head.fuse`), or what it became: `model(fused=function, **inputs)`.
            normalizer: The tokens of the optimizer step, on all processes.
            seed: That of a sparse backward.
        """
        ...

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        """FLOPs of the student in `prepare`."""
        return 0.0

    @staticmethod
    def teacher_top_k(config: LossConfig) -> int | None:
        """How many of its likeliest tokens the teacher is asked for at each place; None: for none."""
        return None


def score_by_teacher(teachers: RoutedTeacher[Any], samples: list[Sample], clock: Clock) -> None:
    """Writes the teachers' log-probs (and likeliest tokens, if they were asked for them) into this process's samples."""
    with clock("teacher"), teachers.ready():
        processes.raise_together(lambda: teachers.score(samples))
