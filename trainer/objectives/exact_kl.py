"""The exact reverse KL at each token's place, a baseline of its one-sample estimate (`loss.baseline: kl`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkl.loss import PerToken, reverse_kl_loss
from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import call_with_rows
from fastkl.trainer.objectives.comparison import Comparison
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
        compared = [(share, Comparison(scorer, batch, temperature), scorer) for share, scorer in scorers]
        for _, comparison, scorer in compared:
            scorer.keep_top_k(batch, comparison.head)

        def mean(rows: Tensor, weight: Tensor, **head: Any) -> Tensor:
            values = [share * _reverse_kl(comparison, rows, weight, head) for share, comparison, _ in compared]
            return torch.stack(values).sum(0)

        return call_with_rows(model, batch, mean)

    student.measure(teachers.groups(samples), "kl_baseline", baseline)


def _reverse_kl(comparison: Comparison, rows: Tensor, weight: Tensor, head: dict[str, Any]) -> Tensor:
    """[n] for the student's hidden states [n, D] and head [V, D]; 0 where it is infinite.

    Writes the scorer's log-probs into the samples.
    """
    theirs = comparison.head
    options = {"tokens": comparison.tokens, "per_token": True, **head, **comparison.options}
    found = reverse_kl_loss(rows, weight, theirs.hidden, theirs.weight, **options).per_token
    assert isinstance(found, PerToken)
    comparison.scatter(found.teacher_logprobs)
    return found.reverse_kl.where(found.reverse_kl != torch.inf, 0.0)
