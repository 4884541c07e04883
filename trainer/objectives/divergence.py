"""Divergences between the whole distributions of student and teacher. The teacher is a model here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from fastkl import loss as losses
from fastkl.loss import LossOutput, PerToken
from fastkl.trainer.config.loss import LossConfig, ObjectiveName
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import UNKNOWN, Sample
from fastkl.trainer.models.scoring import call_with_rows, check_finite
from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.several import RoutedTeacher

# The options of a divergence's loss beside those that all have, and the setting that holds the value of each.
OPTIONS: dict[ObjectiveName, dict[str, str]] = {
    "jsd": {"beta": "jsd_beta"},
    "skewed_reverse_kl": {"alpha": "skew_alpha"},
    "skewed_forward_kl": {"alpha": "skew_alpha"},
}


class FullDivergence(Objective):
    """A divergence of whole distributions. The teacher's are hidden states and a head: no logits beyond a chunk's.

    Its forward pass is that of scoring, only later: batch by batch in the update, with its log-probs of the tokens as a
    by-product. To keep a step's hidden states from an earlier pass would take D_t numbers per token of the step and
    save nothing, since every sample is in one batch of a step.
    """

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[LocalTeacher]) -> None:
        self._config, self._temperature, self._teachers = loss, sampling.temperature, teachers
        self._loss: Callable[..., LossOutput] = getattr(losses, f"{loss.objective}_loss")
        settings = OPTIONS.get(loss.objective, {})
        self._options = {option: getattr(loss, setting) for option, setting in settings.items()}

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        return self._teachers.groups(samples)

    def updating(self) -> AbstractContextManager[None]:
        return self._teachers.ready()

    @numbers_are_checked()
    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        local = self._teachers.of(batch.samples)
        teacher, cut = local.head(batch.samples, batch.tokens.device), local.vocab_size
        known = batch.tokens < (len(teacher.weight) if cut is None else cut)

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            return self._loss(
                rows,
                weight,
                teacher.hidden,
                teacher.weight,
                tokens=batch.tokens.where(known, 0),
                vocab_size=cut,
                per_token=True,
                normalizer=normalizer,
                temperature=self._temperature,
                backward=self._config.backward_pass(seed),
                **self._options,
                **head,
                **{f"teacher_{name}": value for name, value in teacher.options.items()},
            )

        output = call_with_rows(model, batch, loss)
        tokens = output.per_token
        assert isinstance(tokens, PerToken)
        assert tokens.teacher_logprobs is not None
        batch.scatter(check_finite(tokens.teacher_logprobs, "teacher").where(known, UNKNOWN), "teacher_logprobs")
        means = {"top1_agreement": tokens.top1_agreement.mean(), "teacher_entropy": tokens.teacher_entropy.mean()}
        # Over the common ids alone, the student's log-probs are not those it sampled with.
        return output._replace(logprobs=output.logprobs if cut is None else None, metrics=output.metrics | means)
