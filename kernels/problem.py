"""What a loss is to the kernels: plain data, so that it can pass through a torch operator.

A `Spec` names the computation, `Inputs` holds its tensors, an `Objective` says how the rows' values become losses, and
`Needs` which gradients are wanted.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.surrogate import Surrogate, surrogate_terms

Kind = Literal["token_nll", "reverse_kl"]
Backend = Literal["auto", "triton", "torch"]

# K, the values that a row function gives per row; the first one carries the gradient.
OUTPUTS: dict[Kind, int] = {"token_nll": 1, "reverse_kl": 2}


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """z = softcap((h Wᵀ + b) · logit_scale) / temperature, softcap(x) = softcap · tanh(x / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def alpha(self) -> float:
        """The factor of the GEMM: scaled scores x = alpha (h Wᵀ + b)."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def cap(self) -> float | None:
        """z = cap · tanh(x), or z = x where it is None."""
        return None if self.softcap is None else self.softcap / self.temperature


class Spec(NamedTuple):
    """What is computed and how, apart from the tensors."""

    kind: Kind
    student: HeadOptions
    teacher: HeadOptions | None = None
    backend: Backend = "auto"
    chunk_size: int | None = None  # rows; None: what the workspace budget holds


class Inputs(NamedTuple):
    """The tensors of a loss on N rows. Hidden sizes of student and teacher may differ, vocabularies may not."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    tokens: Tensor | None = None  # [N] int64
    teacher_hidden: Tensor | None = None  # [N, D_t]
    teacher_weight: Tensor | None = None  # [V, D_t]
    teacher_bias: Tensor | None = None  # [V]

    def take(self, index: Tensor | None) -> Inputs:
        """The same problem on the rows of `index`; on all of them where it is None."""
        if index is None:
            return self
        tokens, teacher_hidden = _take(self.tokens, index), _take(self.teacher_hidden, index)
        return self._replace(hidden=self.hidden[index], tokens=tokens, teacher_hidden=teacher_hidden)


class Objective(NamedTuple):
    """Losses of rows from their values, and their derivative by values[0]: one entry per row, in the compute dtype.

    weights · values[0], or, with a surrogate, weights · surrogate(log-prob = −values[0]). Without weights: 1 each.
    """

    weights: Tensor | None = None  # [N]
    surrogate: Surrogate | None = None
    advantages: Tensor | None = None  # [N], of a surrogate
    sampler_logprobs: Tensor | None = None  # [N], of a surrogate; None: those of the current policy

    def take(self, index: Tensor | slice | None) -> Objective:
        if index is None:
            return self
        weights, advantages, sampler = (_take(t, index) for t in (self.weights, *self[2:]))
        return Objective(weights, self.surrogate, advantages, sampler)

    def losses_and_slopes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """For values [K, N] of the same rows: losses [N] and d losses / d values[0] [N]."""
        weights = torch.ones_like(values[0]) if self.weights is None else self.weights
        if self.surrogate is None:
            return weights * values[0], weights
        assert self.advantages is not None
        terms = surrogate_terms(self.surrogate, -values[0], self.sampler_logprobs, self.advantages)
        return weights * terms.loss, -weights * terms.slope


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """d loss / d input: hidden in the dtype of the input, weight and bias in the compute dtype."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _take(rows: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if rows is None else rows[index]
