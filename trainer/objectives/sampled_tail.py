"""A list of likeliest tokens, and the sampled token for the others: without bias for the whole vocabulary's reverse KL."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkl.kernels.surrogate import log_ratio
from fastkl.loss import LossOutput, TailPerToken, TopK
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.arrays import end_to_end
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.objectives.top_k import TopKDivergence
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.listener import Clock
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.teacher import Lists

MEMORY = 0.9  # what a token weighs in the running mean, beside one of the next step
RATIOS = ("ratio_mean", "ratio_min", "ratio_max")


class RunningMean:
    """Of numbers that come step by step: those of a step weigh `MEMORY` times those of the next. 0 before there are any."""

    def __init__(self) -> None:
        self._total = self._weight = 0.0

    @property
    def value(self) -> float:
        return self._total / self._weight if self._weight else 0.0

    def add(self, numbers: Iterable[float]) -> None:
        """The numbers of a step, all processes' and in any order: each process rounds its sum once."""
        found = [number for number in numbers if math.isfinite(number)]
        total, count = processes.add({"total": math.fsum(found), "count": len(found)}).values()
        self._total = MEMORY * self._total + total
        self._weight = MEMORY * self._weight + count

    def state_dict(self) -> dict[str, float]:
        return {"total": self._total, "weight": self._weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._total, self._weight = state["total"], state["weight"]


class SampledTailDivergence(TopKDivergence):
    """`top_k_kl_loss` with tail="sampled", whose baseline is the mean gap of earlier steps' tokens outside the lists.

    A token's gap is log p − log q − ρ. The baseline is one number for a whole step, of all its optimizer steps. It depends
    neither on the step's own tokens nor on how they are split into batches or among processes.

    Tokens that do not stand for the tail are taken as listed ones, which add nothing: those of given completions, which the
    student did not sample, and ids that the teacher does not know, on which the distributions are not compared.
    """

    def __init__(self, loss: LossConfig, *others: Any) -> None:
        super().__init__(loss, *others)
        self._gaps = RunningMean()

    @staticmethod
    def lists(config: LossConfig) -> Lists:
        return TopKDivergence.lists(config)._replace(with_token=True)

    def prepare(self, samples: list[Sample], student: Student, clock: Clock) -> dict[str, float]:
        metrics = super().prepare(samples, student, clock)
        for sample in samples:
            if sample.given:
                sample.sampler_logprobs = np.zeros(len(sample.ids))  # no sampler wrote them
        return metrics

    def _tail(self, batch: Batch, lists: TopK, cut: int | None) -> dict[str, Any]:
        stands = self._stands(batch, cut)
        return {
            "tail": "sampled",
            "tokens": batch.tokens.where(stands, lists.ids[:, 0]),
            "token_teacher_logprobs": batch.per_token("teacher_logprobs").where(stands, lists.logprobs[:, 0]),
            "sampler_logprobs": batch.per_token("sampler_logprobs"),
            # Also of ids that are cut: where they are drawn nothing is added, and the mean over all draws is right.
            "tail_baseline": torch.where(batch.given, 0.0, self._gaps.value),
            "tail_weight": self._loss.tail_weight,
            "truncate_ratio": self._loss.truncate_ratio,
        }

    def _said(self, batch: Batch, output: LossOutput, cut: int | None) -> LossOutput:
        tail = output.per_token
        assert isinstance(tail, TailPerToken)
        batch.scatter(tail.gap.where(tail.outside, math.nan), "tail_gaps")
        metrics = {name: value for name, value in output.metrics.items() if name not in ("tail_share", "tail_gap")}
        stands = self._stands(batch, cut)
        if len(stands) and not bool(stands.all()):
            assert output.logprobs is not None
            ratio = log_ratio(output.logprobs, batch.per_token("sampler_logprobs")).exp().where(stands, 1.0)
            metrics |= dict(zip(RATIOS, (ratio.mean(), ratio.min(), ratio.max()), strict=True))
        return super()._said(batch, output._replace(metrics=metrics), cut)

    @staticmethod
    def _stands(batch: Batch, cut: int | None) -> Tensor:
        """[n] which tokens stand for the tail: the student drew them, and the teacher knows them."""
        return ~batch.given if cut is None else ~batch.given & (batch.tokens < cut)

    def updated(self, samples: list[Sample]) -> dict[str, float]:
        drawn = [sample for sample in samples if not sample.given and len(sample.tail_gaps)]
        counts = [sample.weights != 0 if len(sample.weights) else sample.loss_mask for sample in drawn]
        gaps = end_to_end([s.tail_gaps[own] for s, own in zip(drawn, counts, strict=True)], np.float64)
        outside = gaps[~np.isnan(gaps)]
        metrics = {"policy/tail_baseline": self._gaps.value}
        sums = processes.add({"all": len(gaps), "outside": len(outside), "gap": math.fsum(outside)})
        metrics |= {"policy/tail_share": sums["outside"] / sums["all"]} if sums["all"] else {}
        metrics |= {"policy/tail_gap": sums["gap"] / sums["outside"]} if sums["outside"] else {}
        self._gaps.add(outside)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"tail_gaps": self._gaps.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "tail_gaps" in state:
            self._gaps.load_state_dict(state["tail_gaps"])
