"""Policy gradient: tokens are raised or lowered by their advantages, from the teacher's log-probs and from rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastkl.loss import LossOutput, policy_gradient_loss
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.models.sizes.flops import Cost, scoring_flops
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.base import Objective, score_by_teacher
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher


class PolicyGradient(Objective):
    """The policy-gradient surrogate of the samples' advantages (`policy_gradient_loss`).

    An advantage is the reward's, less the reverse KL of the token. Without teachers there is no KL.
    """

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[Any] | None = None) -> None:
        self._loss, self._sampling, self._teachers = loss, sampling, teachers

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> None:
        if self._teachers is not None:
            score_by_teacher(self._teachers, samples, clock)
        with clock("old_logprobs"):
            self._set_old_logprobs(samples, student)
        set_advantages(
            samples, coef=self._loss.kl_coef, discount=self._loss.discount, given_coef=self._sampling.given_coef
        )

    def _set_old_logprobs(self, samples: list[Sample], student: Student) -> None:
        """What the importance ratio is taken against: see `LossConfig.old_logprobs`.

        No sampler wrote the given completions: their ratio is taken against the policy as it is before the update.
        """
        method = self._loss.old_logprobs
        scored = samples if method == "recompute" else [s for s in samples if s.given and method == "sampler"]
        if method == "recompute" or self._sampling.on_policy_fraction < 1:
            student.score(scored, "old_logprobs", self._sampling.temperature)
        for sample in samples:
            if sample.given:
                sample.sampler_logprobs = sample.old_logprobs or [0.0] * len(sample.ids)
            elif method == "sampler":
                sample.old_logprobs = sample.sampler_logprobs

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        return scoring_flops(cost, samples) if self._loss.old_logprobs == "recompute" else 0.0

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: int, seed: int) -> LossOutput:
        old = batch.per_token("old_logprobs") if batch.samples[0].old_logprobs else None

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            return policy_gradient_loss(
                rows,
                weight,
                batch.tokens,
                batch.per_token("advantages"),
                old,
                **dataclasses.asdict(self._loss.surrogate()),
                normalizer=normalizer,
                temperature=self._sampling.temperature,
                backward=self._loss.backward_pass(seed),
                **head,
            )

        return call_with_rows(model, batch, loss)
