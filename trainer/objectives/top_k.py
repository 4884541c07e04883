"""Divergence on a list of likeliest tokens, which a server can tell as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastkl.loss import LossOutput, TopK, top_k_kl_loss
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.models.sizes.flops import Cost, scoring_flops
from fastkl.trainer.objectives.base import Objective, measure_entropies, measuring_flops, score_by_teacher
from fastkl.trainer.objectives.controls import shuffle_lists
from fastkl.trainer.objectives.forward_kl import plus_forward_kl
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.objectives.weights.known import list_entropies
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists, Teacher


class TopKDivergence(Objective):
    """The KL divergence on a list of likeliest tokens, which scoring leaves in the samples (`top_k_kl_loss`).

    The list is the teacher's, or the student's as it is before the update, or both. The student's costs one forward pass
    of it: its samplers draw tokens and keep no lists, and the update's own passes would come too late for a server.
    """

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[Teacher]) -> None:
        self._loss, self._temperature, self._teachers = loss, sampling.temperature, teachers

    @staticmethod
    def lists(config: LossConfig) -> Lists:
        of, k = config.top_k_of, config.top_k
        return Lists(teacher=None if of == "student" else k, student=None if of == "teacher" else k)

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> dict[str, float]:
        measure_entropies(student, samples, self._loss, self._temperature, clock)
        if (k := self.lists(self._loss).student) is not None:
            with clock("student_top_k"):
                student.list_likeliest(self._teachers.groups(samples), k, lambda own: self._teachers.of(own).vocab_size)
        score_by_teacher(self._teachers, samples, clock)
        for sample in samples:
            sample.student_top_k = None  # `teacher_top_k` has it
        if self._loss.control == "shuffled":
            shuffle_lists(samples)
        return {}

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        listing = 0.0 if self._loss.top_k_of == "teacher" else scoring_flops(cost, samples)
        return listing + measuring_flops(self._loss, cost, samples)

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    @numbers_are_checked()
    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        vocabulary, lists = self._teachers.known_ids(batch.samples), batch.top_k()
        weights, normalizer = batch.parts(normalizer)

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            cut = vocabulary if vocabulary != weight.shape[0] else None
            common: dict[str, Any] = {
                "vocab_size": cut,
                "normalizer": normalizer,
                "temperature": self._temperature,
                "backward": self._loss.backward_pass(seed),
                **head,
            }
            output = top_k_kl_loss(rows, weight, *lists, mask=weights, **{**self._tail(batch, lists, cut), **common})
            return plus_forward_kl(
                self._said(batch, output, cut),
                list_entropies(lists),
                weights,
                lambda mask: top_k_kl_loss(rows, weight, *lists, direction="forward", mask=mask, **common),
                self._loss,
            )

        return call_with_rows(model, batch, loss)

    def _tail(self, batch: Batch, lists: TopK, cut: int | None) -> dict[str, Any]:
        """The loss's arguments about what the lists leave out; `cut`: only the ids below are compared."""
        return {
            "direction": self._loss.top_k_direction,
            "tail": self._loss.top_k_tail,
            "tokens": batch.tokens if cut is None else None,
        }

    def _said(self, batch: Batch, output: LossOutput, cut: int | None) -> LossOutput:
        """Over the common ids alone, the student's log-probs are not those it sampled with."""
        return output if cut is None else output._replace(logprobs=None)
