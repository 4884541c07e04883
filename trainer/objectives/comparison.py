"""A student's whole distributions beside those of a model that is loaded here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkl.trainer.data.batching import Batch
from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.models.scoring import check_finite
from fastkl.trainer.teachers.local import LocalTeacher


class Comparison:
    """A scorer that has read the samples of a batch, as the losses over the whole vocabulary take it.

    Of heads of different sizes the common ids are compared.

    Attributes:
        head: The scorer's, with its hidden states.
        known: bool [n], which tokens the scorer knows.
        tokens: [n], 0 where it does not.
        options: Keyword arguments of the losses.
    """

    def __init__(self, scorer: LocalTeacher, batch: Batch, temperature: float) -> None:
        self._role, self._batch = scorer.role, batch
        read = [sample.for_teacher() for sample in batch.samples] if scorer.role == "teacher" else batch.samples
        self.head = scorer.head(read, batch.tokens.device)
        self.known = batch.tokens < (scorer.vocab_size or len(self.head.weight))
        self.tokens = batch.tokens.where(self.known, 0)
        self.options: dict[str, Any] = {
            "vocab_size": scorer.vocab_size,
            "temperature": temperature,
            **{f"teacher_{name}": value for name, value in self.head.options.items()},
        }

    def scatter(self, logprobs: Tensor | None) -> None:
        """Writes what a loss says of the scorer's log-probs [n] of `tokens` into the samples."""
        assert logprobs is not None
        logprobs = check_finite(logprobs, self._role).where(self.known, UNKNOWN)
        self._batch.scatter(logprobs, f"{self._role}_logprobs")
