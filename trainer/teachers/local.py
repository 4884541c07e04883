"""A teacher that is a model here: it was loaded, or the student is it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastkl.loss import linear_top_k
from fastkl.trainer.data.batching import Batch, Layout, batches, in_order
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.scoring import (
    batch_lists,
    batch_logprobs,
    batch_ranks,
    batch_top_k,
    call_with_rows,
    check_finite,
    readable,
    scatter_values,
    scoring,
)
from fastkl.trainer.models.sizes.flops import Cost, cost_of, scoring_flops
from fastkl.trainer.teachers.lists import joined


class TeacherHead(NamedTuple):
    """A teacher's whole distributions, as the divergences of `fastkl.loss` take them."""

    hidden: Tensor  # [n, D_t], of the counted tokens
    weight: Tensor  # [V, D_t]
    options: dict[str, Any]  # bias, logit_scale, softcap


class LocalTeacher:
    """Scores with forward passes of a model (see `Teacher`).

    Args:
        model: A fused one.
        layout: How sequences share a forward pass: see `batch_layout`.
        max_tokens: At most so many tokens in one.
        temperature: That of the log-probs.
        device: Where the model is.
        top_k: Find so many of the likeliest tokens too; null for none.
        vocab_size: The ids that it shares with the student, where heads are padded to different sizes.
        shared_only: Normalise the tokens' log-probs over those ids alone, as those of lists are.
        role: What messages and metrics call it, and what the samples' list of its log-probs begins with: teacher or
            reference.
        as_teacher: A context in which the model is the teacher: with the adapter off, where it is the student's base.
        cost: That of a forward pass; null: of the whole model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        max_tokens: int,
        temperature: float,
        device: torch.device,
        *,
        top_k: int | None = None,
        vocab_size: int | None = None,
        shared_only: bool = False,
        role: str = "teacher",
        as_teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
        cost: Cost | None = None,
    ) -> None:
        self.model, self.vocab_size, self.role = model, vocab_size, role
        self._device, self._top_k, self._as_teacher = device, top_k, as_teacher
        self._shared_only = shared_only
        self._layout, self._max_tokens, self._temperature = layout, max_tokens, temperature
        self._cost = cost_of(self.model) if cost is None else cost
        # Of the head, on the student's device where that is another: the version of the weights, and they.
        self._copies: dict[Tensor, tuple[int, Tensor]] = {}

    @contextmanager
    def writing(self) -> Iterator[PreTrainedModel]:
        """The model, while it is the teacher: for what samples from it."""
        with self._as_teacher():
            yield self.model

    def score(self, samples: Sequence[Sample]) -> None:
        self._scatter(samples, f"{self.role}_logprobs", self._scores)

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        self._scatter(samples, "teacher_ranks", lambda batch: batch_ranks(self.model, batch, vocab_size))

    def score_plain(self, samples: Sequence[Sample]) -> None:
        plain = [dataclasses.replace(sample) for sample in samples]
        self.score(plain)
        for sample, scored in zip(samples, plain, strict=True):
            sample.plain_logprobs = scored.teacher_logprobs

    def recheck(self) -> None:
        pass  # nobody can have replaced it

    def _scatter(self, samples: Sequence[Sample], field: str, values: Callable[[Batch], Tensor]) -> None:
        with self._as_teacher():
            scatter_values(self.model, batches(samples, self._max_tokens, self._layout, self._device), field, values)

    def _logprobs(self, batch: Batch) -> Tensor:
        return check_finite(batch_logprobs(self.model, batch, self._temperature), self.role)

    def _scores(self, batch: Batch) -> Tensor:
        """The log-probs; lists, where they are asked for, go into the samples."""
        listed = batch.student_top_k()
        if self._top_k is None and listed is None:
            return self._logprobs(batch)
        if self._top_k is not None and listed is None and not self._shared_only:
            logprobs, likeliest = batch_top_k(self.model, batch, self._temperature, self._top_k, self.vocab_size)
            batch.scatter_top_k(likeliest)
        else:
            logprobs, lists = batch_lists(self.model, batch, self._temperature, self._top_k, self.vocab_size, listed)
            batch.scatter_top_k(joined(lists))
        return check_finite(logprobs, "teacher")

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        return {f"flops/{self.role}": scoring_flops(self._cost, samples)}

    def head(self, samples: list[Sample], device: torch.device) -> TeacherHead:
        """Hidden states of the samples' counted tokens, in the samples' order, on a device."""

        def keep(rows: Tensor, weight: Tensor, *, bias: Tensor | None, **options: Any) -> TeacherHead:
            bias = None if bias is None else self._on_device(bias, device)
            return TeacherHead(rows.to(device), self._on_device(weight, device), {"bias": bias, **options})

        with self._as_teacher(), scoring(self.model):
            heads = [
                call_with_rows(self.model, batch, keep, readable(self.model, batch))
                for batch in in_order(samples, self._max_tokens, self._layout, self._device)
            ]
        return heads[0]._replace(hidden=torch.cat([head.hidden for head in heads]))

    def keep_top_k(self, batch: Batch, head: TeacherHead) -> None:
        """Gives the samples of a batch the likeliest tokens that `score` gives them, from what their `head` is."""
        if self._top_k is not None:
            options = {"vocab_size": self.vocab_size, "temperature": self._temperature, **head.options}
            batch.scatter_top_k(linear_top_k(head.hidden, head.weight, self._top_k, **options))

    def _on_device(self, parameter: Tensor, device: torch.device) -> Tensor:
        """A parameter on a device; a copy is made again when the weights are others."""
        if parameter.device == device:
            return parameter.detach()
        version, copy = self._copies.get(parameter, (None, None))
        if copy is None or version != parameter._version:
            version, copy = parameter._version, parameter.detach().to(device)
            self._copies[parameter] = version, copy
        return copy
