"""Divergences between the whole distributions of student and teacher. The teacher is a model here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastkl import loss as losses
from fastkl.loss import LossOutput, PerToken
from fastkl.trainer.config.loss import LossConfig, ObjectiveName
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.models.sizes.flops import Cost
from fastkl.trainer.objectives.base import Objective, measure_entropies, measuring_flops, score_by_teacher
from fastkl.trainer.objectives.common import CommonComparison
from fastkl.trainer.objectives.comparison import Comparison
from fastkl.trainer.objectives.forward_kl import plus_forward_kl
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.objectives.weights.step import needs_teacher_first
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher, TeacherHead
from fastkl.trainer.teachers.several import RoutedTeacher

IGNORED = -100  # in place of the ids of tokens that are left out
# The options of a divergence's loss beside those that all have, and the setting that holds the value of each.
OPTIONS: dict[ObjectiveName, dict[str, str]] = {
    "jsd": {"beta": "jsd_beta"},
    "skewed_reverse_kl": {"alpha": "skew_alpha"},
    "skewed_forward_kl": {"alpha": "skew_alpha"},
    "density_power": {"power": "divergence_power"},
}


class FullDivergence(Objective):
    """A divergence of whole distributions. The teacher's are hidden states and a head: no logits beyond a chunk's.

    Its forward pass is that of scoring, only later: batch by batch in the update, with its log-probs of the tokens as a
    by-product. To keep a step's hidden states from an earlier pass would take D_t numbers per token of the step and
    save nothing, since every sample is in one batch of a step. Only where weights are made of the teacher's log-probs is
    there a pass for them before.
    """

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[LocalTeacher]) -> None:
        self._config, self._temperature, self._teachers = loss, sampling.temperature, teachers
        self._loss: Callable[..., LossOutput] = getattr(losses, f"{loss.objective}_loss")
        settings = OPTIONS.get(loss.objective, {})
        self._options = {option: getattr(loss, setting) for option, setting in settings.items()}

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> dict[str, float]:
        measure_entropies(student, samples, self._config, self._temperature, clock)
        if needs_teacher_first(self._config):
            score_by_teacher(self._teachers, samples, clock)
        return {}

    @staticmethod
    def teacher_passes(config: LossConfig) -> int:
        return 1 + needs_teacher_first(config)

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        return measuring_flops(self._config, cost, samples)

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    def updating(self) -> AbstractContextManager[None]:
        return self._teachers.ready()

    @numbers_are_checked()
    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        local, common_ids = self._teachers.of(batch.samples), self._teachers.common(batch.samples)
        if common_ids is not None:
            compared = CommonComparison(local, common_ids, batch, self._temperature)
            return self._over_common(model, batch, compared, normalizer, seed)
        comparison, cut = Comparison(local, batch, self._temperature), local.vocab_size
        teacher, known = comparison.head, comparison.known
        weights, normalizer = batch.parts(normalizer)

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            backward = self._config.backward_pass(seed)
            common = {"normalizer": normalizer, "backward": backward, **head, **comparison.options}
            heads = rows, weight, teacher.hidden, teacher.weight
            options = {"tokens": comparison.tokens, "per_token": True, "mask": weights, **self._options}
            output = self._loss(*heads, **options, **common)
            assert isinstance(output.per_token, PerToken)
            return plus_forward_kl(
                output,
                output.per_token.teacher_entropy,
                weights,
                lambda mask: losses.forward_kl_loss(*heads, mask=mask, **common),
                self._config,
            )

        output = call_with_rows(model, batch, loss)
        tokens = output.per_token
        assert isinstance(tokens, PerToken)
        assert tokens.teacher_logprobs is not None
        logprobs, weighed = tokens.teacher_logprobs, torch.ones_like(known)
        if weights is not None:
            weighed = weights != 0
            logprobs = logprobs + self._left_out(teacher, batch.tokens.where(known & ~weighed, IGNORED), cut)
        comparison.scatter(logprobs)
        means = {name: getattr(tokens, name)[weighed].mean() for name in ("top1_agreement", "teacher_entropy")}
        # Over the common ids alone, the student's log-probs are not those it sampled with.
        return output._replace(logprobs=output.logprobs if cut is None else None, metrics=output.metrics | means)

    def _over_common(
        self, model: Callable[..., LossOutput], batch: Batch, compared: CommonComparison, normalizer: float, seed: int
    ) -> LossOutput:
        """From a teacher with its own tokenizer: over the tokens that both have, and one outcome for the rest."""
        weights, normalizer = batch.parts(normalizer)

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            teacher = compared.logits(rows, weight, head)
            output = self._loss(
                rows,
                weight,
                teacher_logits=teacher,
                tokens=batch.tokens,
                mask=weights,
                normalizer=normalizer,
                temperature=self._temperature,
                backward=self._config.backward_pass(seed),
                **self._options,
                **head,
            )
            means = teacher.rests.nanmean(1).nan_to_num()  # NaN: of tokens that are left out
            names = ("rest_mass", "teacher_rest_mass")
            return output._replace(metrics=output.metrics | dict(zip(names, means, strict=True)))

        return call_with_rows(model, batch, loss)

    def _left_out(self, teacher: TeacherHead, tokens: Tensor, cut: int | None) -> Tensor:
        """The teacher's log-probs [n] of tokens that have the weight 0, of which the loss says nothing; 0 where IGNORED."""
        with torch.no_grad():
            stats = losses.linear_token_stats(
                teacher.hidden,
                teacher.weight,
                tokens,
                ignore_index=IGNORED,
                vocab_size=cut,
                temperature=self._temperature,
                **teacher.options,
            )
        return stats.logprobs
