"""What a loss is to the kernels: plain data, so that it can pass through a torch operator.

A `Problem` has four parts. `Inputs` are its tensors. `Spec` names the computation. `RowLoss` says how the values of a row
become its loss, and `Rows` which rows take part. `Needs` says which gradients are wanted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import ROWS, ROWS_WITH_EXTRAS
from fastkl.kernels.options import CrossEntropy, SampledTail, Sparse, Surrogate
from fastkl.kernels.rows.interface import TailTokens
from fastkl.kernels.rows.parallel.share import Share
from fastkl.kernels.surrogate import log_ratio, surrogate_terms
from fastkl.kernels.top_k.sampled import ROWS_WITH_TAIL

Kind = Literal["token_nll", "token_nll_entropy", "cross_entropy", "divergence", "top_k"]
Backend = Literal["auto", "triton", "torch", "epilogue"]
TeacherChunks = Callable[[Tensor], Tensor]  # rows [n] of the N -> their teacher logits [n, V]


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """z = softcap((h Wᵀ + b) · logit_scale) / temperature, softcap(x) = softcap · tanh(x / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; it must be > 0 and finite (greedy decoding has no log-probs)"
            )
        if not 0 < self.logit_scale < float("inf"):
            raise ValueError(f"logit_scale is {self.logit_scale}; it must be > 0 and finite")
        if self.softcap is not None and not 0 < self.softcap < float("inf"):
            raise ValueError(f"softcap is {self.softcap}; it must be > 0 and finite, or None for a head without one")

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
    teacher: HeadOptions | None = None  # of a divergence
    backend: Backend = "auto"
    chunk_size: int | None = None  # rows; None: what the workspace budget holds
    variant: str = ""  # of a divergence: its name; of top_k: its direction and tail
    parameter: float = 0.0  # of a divergence
    extras: bool = False  # a divergence's by-products, a cross-entropy's predictions
    sparse: Sparse | None = None  # None: the backward pass is exact
    cross_entropy: CrossEntropy | None = None  # of that kind
    hard_coef: float = 0.0  # of a divergence: of the cross-entropy at temperature 1 beside it
    tail: SampledTail | None = None  # of top_k "reverse-bucket", to which the sampled tokens add what it lacks
    share: Share | None = None  # of the vocabulary, that this process has; None: it has all ids

    @property
    def outputs(self) -> int:
        """K, the values that the row function gives per row; the first one carries the gradient."""
        hard = 1 if self.hard_coef != 0.0 else 0
        if self.kind == "divergence":
            return (ROWS_WITH_EXTRAS if self.extras else ROWS) + hard
        if self.kind == "cross_entropy":
            return 5 if self.extras else 4
        if self.kind == "top_k":
            return (ROWS_WITH_TAIL if self.tail is not None else ROWS) + hard
        return {"token_nll": 1, "token_nll_entropy": 5}[self.kind]


class Inputs(NamedTuple):
    """The tensors of a loss on N rows. Hidden sizes of student and teacher may differ, vocabularies may not.

    V are the ids of this process, where several share the vocabulary (`Spec.share`).

    A divergence has its teacher as a head or as logits, top_k as the list of the teacher's likeliest tokens, and with a
    sampled tail what the teacher says of the tokens too.
    """

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    tokens: Tensor | None = None  # [N] int64
    teacher_hidden: Tensor | None = None  # [N, D_t]
    teacher_weight: Tensor | None = None  # [V, D_t]
    teacher_bias: Tensor | None = None  # [V]
    teacher_logits: Tensor | TeacherChunks | None = None  # [N, V], before any scaling
    top_ids: Tensor | None = None  # [N, k] int64
    top_logprobs: Tensor | None = None  # [N, k], compute dtype
    tail: TailTokens | None = None  # of N rows
    class_weight: Tensor | None = None  # one for each id of all processes, compute dtype

    def take(self, index: Tensor | None) -> Inputs:
        """The same problem on the rows of `index`; on all of them where it is None."""
        if index is None:
            return self
        logits = self.teacher_logits
        return self._replace(
            hidden=self.hidden[index],
            tokens=_take(self.tokens, index),
            teacher_hidden=_take(self.teacher_hidden, index),
            teacher_logits=None if logits is None else _lazy_rows(logits, index),
            top_ids=_take(self.top_ids, index),
            top_logprobs=_take(self.top_logprobs, index),
            tail=None if self.tail is None else self.tail.take(index),
        )


class RowLoss(NamedTuple):
    """Losses of rows from their values, and their derivatives by the values: one entry per row, in the compute dtype.

        weights · (values[0] + hard_coef · values[−1])                                 without a surrogate
        weights · (surrogate(log-prob = −values[0]) − entropy_coef · values[1])        with one
        slopes[0] · values[0] + slopes[1] · values[1] + slopes[2] · lse                with slopes, and nothing else

    Without weights: 1 each. A weight of 0 makes a loss of 0, whatever the values, and so does a ratio that the surrogate
    leaves out. The entropy is values[1] of kind "token_nll_entropy", which an entropy_coef other than 0 wants, and slopes
    too.
    """

    weights: Tensor | None = None  # [N]
    advantages: Tensor | None = None  # [N], of a surrogate
    old_logprobs: Tensor | None = None  # [N], of a surrogate; None: those of the current policy
    surrogate: Surrogate | None = None
    entropy_coef: float = 0.0
    slopes: Tensor | None = None  # [3, N]
    log_ratios: Tensor | None = None  # [N], of a surrogate that takes these, in place of those to the old_logprobs
    ref_logprobs: Tensor | None = None  # [N], of a surrogate with a KL to a reference
    hard_coef: float = 0.0  # `Spec.hard_coef`, which the gradient of values[0] has in it

    def take(self, index: Tensor | slice | None) -> RowLoss:
        if index is None:
            return self
        rows = [field[..., index] if isinstance(field, Tensor) else field for field in self]
        return RowLoss._make(rows)

    def times(self, upstream: Tensor) -> RowLoss:
        """The losses multiplied by `upstream` [N]."""
        return self._replace(weights=upstream if self.weights is None else self.weights * upstream)

    def losses_and_slopes(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """For values [K, N] of the same rows: losses [N], d losses / d values[0] [N], and by entropy and lse [2, N] if
        those are not 0.
        """
        if self.slopes is not None:
            terms_of = torch.stack([values[0], values[1], values[2] + values[3]])
            return _weighted(self.slopes, terms_of).sum(0), self.slopes[0], self.slopes[1:]
        weights = torch.ones_like(values[0]) if self.weights is None else self.weights
        if self.surrogate is None:
            value = values[0] if self.hard_coef == 0.0 else values[0] + self.hard_coef * values[-1]
            return _weighted(weights, value), weights, None
        assert self.advantages is not None
        logprobs = -values[0]
        ratios = log_ratio(logprobs, self.old_logprobs) if self.log_ratios is None else self.log_ratios
        terms = surrogate_terms(self.surrogate, logprobs, ratios, self.advantages, self.ref_logprobs)
        if self.surrogate.ratio_bounds is not None:
            weights = weights.where(~terms.outside, 0.0)
        if self.entropy_coef == 0.0:
            return _weighted(weights, terms.loss), -_weighted(weights, terms.slope), None
        losses = _weighted(weights, terms.loss - self.entropy_coef * values[1])
        by_entropy = -self.entropy_coef * weights
        return losses, -_weighted(weights, terms.slope), torch.stack([by_entropy, torch.zeros_like(by_entropy)])


class Rows(NamedTuple):
    """Which rows take part, bool [N] each."""

    active: Tensor | None = None  # rows that have values; None: all
    graded: Tensor | None = None  # those of them that have losses and gradients; None: the active ones

    @property
    def counted(self) -> Tensor | None:
        return self.active if self.graded is None else self.graded


class Problem(NamedTuple):
    """All that the values, losses and gradients of N rows depend on."""

    inputs: Inputs
    spec: Spec
    row_loss: RowLoss = RowLoss()
    rows: Rows = Rows()


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
    statistics: Tensor | None = None  # [2], `ColumnSampler.statistics` of a sparse backward


def _weighted(weights: Tensor, losses: Tensor) -> Tensor:
    """0 · ∞ = 0: what has no weight may be anything."""
    return (weights * losses).where(weights != 0, 0.0)


def _lazy_rows(logits: Tensor | TeacherChunks, index: Tensor) -> TeacherChunks:
    """The logits of the rows in `index`, taken chunk by chunk: they are of size N × V."""
    return (lambda rows: logits(index[rows])) if callable(logits) else (lambda rows: logits[index[rows]])


def _take(rows: Tensor | None, index: Tensor | slice) -> Tensor | None:
    return None if rows is None else rows[index]
