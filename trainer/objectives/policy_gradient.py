"""Policy gradient: tokens are raised or lowered by their advantages, from the teacher's log-probs and from rewards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from fastkl.loss import LossOutput, policy_gradient_loss, top_k_kl_loss
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.models.sizes.flops import Cost, scoring_flops
from fastkl.trainer.objectives.advantages import set_advantages
from fastkl.trainer.objectives.base import Objective, measure_entropies, measuring_flops, score_by_teacher
from fastkl.trainer.objectives.controls import with_scores
from fastkl.trainer.objectives.exact_kl import score_with_exact_kl
from fastkl.trainer.objectives.forward_kl import plus_forward_kl
from fastkl.trainer.objectives.weights.known import list_entropies
from fastkl.trainer.objectives.weights.step import needs_entropies_first
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists


class PolicyGradient(Objective):
    """The policy-gradient surrogate of the samples' advantages (`policy_gradient_loss`).

    An advantage is the reward's, less the reverse KL of the token. Without teachers there is no KL.
    """

    def __init__(self, loss: LossConfig, sampling: SamplingConfig, teachers: RoutedTeacher[Any] | None = None) -> None:
        self._loss, self._sampling, self._teachers = loss, sampling, teachers

    @staticmethod
    def lists(config: LossConfig) -> Lists:
        if config.forward_kl_above is None:
            return Lists()
        return Lists(teacher=config.forward_kl_top_k, setting="loss.forward_kl_top_k")

    def groups(self, samples: list[Sample]) -> list[list[Sample]]:
        if self._teachers is None or self._loss.forward_kl_above is None:
            return [samples]
        return self._teachers.groups(samples)

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> dict[str, float]:
        if self._teachers is not None:
            self._score(self._teachers, samples, student, clock)
        with clock("old_logprobs"):
            self._set_old_logprobs(samples, student)
            if self._sampling.steps_ahead and self._teachers is not None:
                # With those of the sampler it would be the gradient of KL(p ‖ q) − KL(p ‖ p_old): away from older weights.
                student.score(samples, "student_logprobs", self._sampling.temperature)
        if self._loss.old_logprobs != "recompute":
            measure_entropies(student, samples, self._loss, self._sampling.temperature, clock)
        judged = with_scores(samples, self._loss)
        metrics = set_advantages(judged, self._loss, self._sampling.given_coef)
        for sample, other in zip(samples, judged, strict=True):
            sample.advantages = other.advantages
        return metrics

    def _score(self, teachers: RoutedTeacher[Any], samples: list[Sample], student: Student, clock: Clock) -> None:
        if self._loss.baseline != "kl":
            score_by_teacher(teachers, samples, clock)
            return
        with clock("teacher"), teachers.ready():
            score_with_exact_kl(teachers, samples, student, self._sampling.temperature, self._loss.extrapolate)

    def _set_old_logprobs(self, samples: list[Sample], student: Student) -> None:
        """What the importance ratio is taken against: see `LossConfig.old_logprobs`.

        No sampler wrote the given completions: their ratio is taken against the policy as it is before the update.
        """
        method = self._loss.old_logprobs
        scored = samples if method == "recompute" else [s for s in samples if s.given and method == "sampler"]
        if method == "recompute" and needs_entropies_first(self._loss):
            student.measure_entropies(samples, self._sampling.temperature, "old_logprobs")
        elif method == "recompute" or self._sampling.on_policy_fraction < 1:
            student.score(scored, "old_logprobs", self._sampling.temperature)
        for sample in samples:
            if sample.given:
                sample.sampler_logprobs = sample.old_logprobs if len(sample.old_logprobs) else np.zeros(len(sample.ids))
            elif method == "sampler":
                sample.old_logprobs = sample.sampler_logprobs

    def preparing_flops(self, cost: Cost, samples: list[Sample]) -> float:
        recomputed = self._loss.old_logprobs == "recompute"
        first = scoring_flops(cost, samples) if recomputed else measuring_flops(self._loss, cost, samples)
        more = (self._loss.baseline == "kl") + (self._sampling.steps_ahead > 0 and self._teachers is not None)
        return first + more * scoring_flops(cost, samples)

    def __call__(self, model: Callable[..., LossOutput], batch: Batch, normalizer: float, seed: int) -> LossOutput:
        old = batch.per_token("old_logprobs") if len(batch.samples[0].old_logprobs) else None
        likeliest, vocabulary = None, None
        weights, normalizer = batch.parts(normalizer)
        if self._teachers is not None and self._loss.forward_kl_above is not None:
            likeliest, vocabulary = batch.top_k(), self._teachers.of(batch.samples).vocab_size

        def loss(rows: Tensor, weight: Tensor, **head: Any) -> LossOutput:
            common = {
                "normalizer": normalizer,
                "temperature": self._sampling.temperature,
                "backward": self._loss.backward_pass(seed),
                **head,
            }
            output = policy_gradient_loss(
                rows,
                weight,
                batch.tokens,
                batch.per_token("advantages"),
                old,
                **dataclasses.asdict(self._loss.surrogate()),
                ratio=self._loss.ratio,
                sequence_ids=batch.sequences if self._loss.ratio == "sequence" else None,
                mask=weights,
                **common,
            )
            if likeliest is None:
                return output
            entropies, cut = list_entropies(likeliest), vocabulary if vocabulary != weight.shape[0] else None
            forward_kl = partial(top_k_kl_loss, rows, weight, *likeliest, direction="forward", vocab_size=cut, **common)
            return plus_forward_kl(output, entropies, weights, lambda mask: forward_kl(mask=mask), self._loss)

        return call_with_rows(model, batch, loss)
