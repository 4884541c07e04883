"""The row interface: what a loss does to a chunk of logits while the chunk exists.

A row function is given the logits of n rows, writes K values per row into `out` [K, n] and, if it is given a tensor
`gradient` [n, V], the derivative of `out[0]` with respect to the *scaled scores* x from which the driver made them:

    z = x            or            z = cap · tanh(x)   where the head has a soft-cap

A row function in Triton is given x without the bias of the head, and adds that while it reads (`backend.adds_bias`).

It may return a factor [n] that each row of the gradient is still to be multiplied by: what is known at the end of a walk
over the logits needs no second walk then. None is a factor of 1.

`gradient` is `logits.student` itself or apart from it, in a dtype of its own (what the next GEMM wants). The chunks are
scratch space: nobody reads them afterwards. Nothing of their size is allocated. `out` is a view whose rows may lie apart.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from fastkl.kernels.rows.parallel.vocabulary import WHOLE, Vocabulary


class TailTokens(NamedTuple):
    """What is known of the sampled tokens, for a tail that they stand for: [n] each, compute dtype."""

    teacher_logprobs: Tensor
    sampler_logprobs: Tensor | None = None  # None: the student itself sampled them
    baseline: Tensor | None = None  # None: 0

    def take(self, index: Tensor | slice) -> TailTokens:
        return TailTokens._make([None if rows is None else rows[index] for rows in self])


class Logits(NamedTuple):
    """Scaled scores x of a chunk, and what there is of the teacher: its scores, or its likeliest tokens."""

    student: Tensor  # [n, V], compute dtype
    student_cap: float | None = None
    teacher: Tensor | None = None  # [n, V], compute dtype
    teacher_cap: float | None = None
    student_bias: Tensor | None = None  # [V] float32, contiguous: alpha · b, which x lacks; None in PyTorch
    teacher_bias: Tensor | None = None  # [V] float32, likewise
    top_ids: Tensor | None = None  # [n, k] int64
    top_logprobs: Tensor | None = None  # [n, k], compute dtype
    tail: TailTokens | None = None
    class_weight: Tensor | None = None  # one for each of all ids, compute dtype
    vocabulary: Vocabulary = WHOLE


class RowFunction(Protocol):
    def __call__(
        self, logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None
    ) -> Tensor | None: ...


class ClearRows(Protocol):
    """The gradient [n, V] becomes 0 in the rows whose slope [n] is 0; there it may have been infinite or NaN."""

    def __call__(self, gradient: Tensor, slope: Tensor) -> None: ...


class EntropyGradient(Protocol):
    """The gradient of weights[0] · out[0] + weights[1] · out[1] + weights[2] · lse on the chunk that `token_nll_entropy`
    has just been given, and has left as it likes; weights [3, n]."""

    def __call__(self, logits: Logits, tokens: Tensor, out: Tensor, weights: Tensor, gradient: Tensor) -> None: ...
