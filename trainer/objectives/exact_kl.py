"""The exact reverse KL at each token's place, a baseline of its one-sample estimate (`loss.baseline: kl`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.loss import PerToken, reverse_kl_loss
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import UNKNOWN, Sample
from fastkl.trainer.models.scoring import call_with_rows, check_finite
from fastkl.trainer.objectives.numbers import numbers_are_checked
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.several import RoutedTeacher


@numbers_are_checked()
def score_with_exact_kl(
    teachers: RoutedTeacher[LocalTeacher],
    samples: list[Sample],
    student: Student,
    temperature: float,
    extrapolate: float,
) -> None:
    """Writes the log-probs that scoring writes, and into `kl_baseline` the mean of d over all that could stand at a place.

    With p, q and r the distributions of student, teacher and reference, and λ the extrapolation, it is
    λ KL(p ‖ q) + (1 − λ) KL(p ‖ r), where what is infinite counts as 0. It takes one forward pass of each model, and no
    logits beyond a chunk's. Of heads of different sizes the common ids are compared.
    """

    def baseline(model: Callable[..., Tensor], batch: Batch) -> Tensor:
        scorers = [(extrapolate, teachers.of(batch.samples))]
        scorers += [] if teachers.reference is None else [(1.0 - extrapolate, teachers.reference)]
        comparisons = [(share, Comparison(scorer, batch, temperature)) for share, scorer in scorers]

        def mean(rows: Tensor, weight: Tensor, **head: Any) -> Tensor:
            values = [share * comparison.reverse_kl(rows, weight, **head) for share, comparison in comparisons]
            return torch.stack(values).sum(0)

        return call_with_rows(model, batch, mean)

    student.measure(teachers.groups(samples), "kl_baseline", baseline)


class Comparison:
    """A student with a scorer that is loaded here, at the tokens of a batch; the scorer has read them."""

    def __init__(self, scorer: LocalTeacher, batch: Batch, temperature: float) -> None:
        self._scorer, self._batch, self._temperature = scorer, batch, temperature
        read = [sample.for_teacher() for sample in batch.samples] if scorer.role == "teacher" else batch.samples
        self._head = scorer.head(read, batch.tokens.device)
        scorer.keep_top_k(batch, self._head)

    def reverse_kl(self, rows: Tensor, weight: Tensor, **head: Any) -> Tensor:
        """[n] for the student's hidden states [n, D] and head [V, D]; 0 where it is infinite.

        Writes the scorer's log-probs into the samples.
        """
        cut = self._scorer.vocab_size
        known = self._batch.tokens < (len(self._head.weight) if cut is None else cut)
        output = reverse_kl_loss(
            rows,
            weight,
            self._head.hidden,
            self._head.weight,
            tokens=self._batch.tokens.where(known, 0),
            vocab_size=cut,
            per_token=True,
            temperature=self._temperature,
            **head,
            **{f"teacher_{name}": value for name, value in self._head.options.items()},
        )
        found = output.per_token
        assert isinstance(found, PerToken)
        assert found.teacher_logprobs is not None
        logprobs = check_finite(found.teacher_logprobs, self._scorer.role)
        self._batch.scatter(logprobs.where(known, UNKNOWN), f"{self._scorer.role}_logprobs")
        return found.reverse_kl.where(found.reverse_kl != torch.inf, 0.0)
