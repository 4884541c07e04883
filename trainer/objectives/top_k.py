"""Divergence from the teacher's k likeliest tokens, which a server can tell as well."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastkl.kernels.options import Direction, ListTail
from fastkl.loss import LossOutput, top_k_kl_loss
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.models.sizes.flops import Cost
from fastkl.trainer.objectives.base import Objective, measure_entropies, measuring_flops, score_by_teacher
from fastkl.trainer.objectives.controls import shuffle_lists
from fastkl.trainer.objectives.forward_kl import list_entropies, plus_forward_kl
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Teacher


class TopKDivergence(Objective):
    """The KL divergence to the teacher's likeliest tokens, which scoring leaves in the samples (`top_k_kl_loss`)."""

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[Teacher]) -> None:
        self._loss, self._temperature, self._teachers = loss, sampling.temperature, teachers

    @staticmethod
    def teacher_top_k(config: LossConfig) -> int | None:
        return config.top_k

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> None:
        measure_entropies(student, samples, self._loss, self._temperature, clock)
        score_by_teacher(self._teachers, samples, clock)
        if self._loss.control == "shuffled":
            shuffle_lists(samples)

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        return measuring_flops(self._loss, cost, samples)

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    @numbers_are_checked()
    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        vocabulary, likeliest = self._teachers.of(batch.samples).vocab_size, batch.top_k()
        weights = batch.weights

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            cut = vocabulary if vocabulary != weight.shape[0] else None

            def divergence(direction: Direction, tail: ListTail, mask: Tensor | None) -> LossOutput:
                return top_k_kl_loss(
                    rows,
                    weight,
                    *likeliest,
                    direction=direction,
                    tail=tail,
                    tokens=batch.tokens if cut is None else None,
                    vocab_size=cut,
                    mask=mask,
                    normalizer=normalizer,
                    temperature=self._temperature,
                    backward=self._loss.backward_pass(seed),
                    **head,
                )

            output = divergence(self._loss.top_k_direction, self._loss.top_k_tail, weights)
            forward_kl = partial(divergence, "forward", "bucket")
            return plus_forward_kl(output, list_entropies(likeliest), weights, forward_kl, self._loss)

        return call_with_rows(model, batch, loss)
