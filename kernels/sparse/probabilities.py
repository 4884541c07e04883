"""The probabilities that the columns of a block are kept with, and whether leaving any out is worth it (`estimator.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.options import Sparse

BREAK_EVEN = 0.5  # of the columns: from here on the product of all of them is no slower than that of those kept
SOLVED_COLUMNS = 2**13  # at least; τ is solved from every so many-th column
LEAST_SLOPE = 1e-3  # of the block's root mean square: bounds û in rows that hardly count and share the others' columns


def row_weights(slope: Tensor, factor: Tensor | None = None) -> Tensor:
    """What the squares of a row are counted by, [B]; `factor` as in `ColumnSampler.sample`."""
    if factor is not None:
        return row_weights(slope / factor) * factor.square()
    weights = slope.square()
    return weights.add_(LEAST_SLOPE**2 * weights.mean())


class Solution(NamedTuple):
    """The probabilities of a block's columns, min(1, w / τ); all but w are 0-dim."""

    w: Tensor  # [V], ∞ where a column is certain
    tau: Tensor
    total: Tensor  # Σ w² over all columns
    lost: Tensor  # the variance of û
    expected: Tensor  # Σ π


def solve(sparse: Sparse, squares: Tensor, always: list[Tensor]) -> Solution:
    """From w² [V], which is overwritten; ids in `always` are certain.

    An id outside the vocabulary has made its row NaN. It must not end in a device-side assertion here.
    """
    total = squares.sum()
    always = [ids.clamp(0, squares.shape[0] - 1) for ids in always]
    for ids in always:
        squares.index_fill_(0, ids, 0.0)
    w = squares.sqrt_()
    tau = block_threshold(sparse, w, total)
    lost = torch.dot(w, (tau - w).clamp_(min=0.0))
    for ids in always:
        w.index_fill_(0, ids, torch.inf)
    return Solution(w, tau, total, lost, expected_columns(w, tau))


def block_threshold(sparse: Sparse, w: Tensor, total: Tensor) -> Tensor:
    """τ of a block, 0-dim: for w [V], 0 where a column is certain, and `total` = Σ w² over all columns."""
    if sparse.threshold is not None:
        return w.new_full((), sparse.threshold)
    some = w[:: max(1, w.shape[0] // SOLVED_COLUMNS)]
    return threshold(some, sparse.error**2 * total * (some.shape[0] / w.shape[0]))


def threshold(w: Tensor, variance: Tensor) -> Tensor:
    """The τ with Σ_{w < τ} w (τ − w) = `variance`, 0-dim, for w ≥ 0 [V].

    The left side grows with τ and is linear in it between two neighbours of w: sums over the sorted w find the place.
    """
    dtype, w = w.dtype, w.sort().values.double()
    largest = w[-1:].clamp(min=torch.finfo(torch.float32).tiny)
    w, variance = w / largest, variance.double() / largest.square()
    first, second = running_sums(w), running_sums(w.square())
    index = torch.searchsorted(w * first - second, variance).clamp_(1, w.shape[0]) - 1
    tau = (variance + second[index]) / first[index].clamp(min=torch.finfo(torch.float32).tiny)
    return (largest * tau).squeeze(0).to(dtype)


def running_sums(x: Tensor) -> Tensor:
    """x₀, x₀ + x₁, … in float64, for x [n] in [0, 1], to within n · 2⁻ᵇ with 2ᵇ · n ≤ 2⁶².

    The sums are of integers, whose order shows in no bit. On CUDA a running sum of floats differs from call to call.
    """
    scale = 2.0 ** (62 - x.shape[0].bit_length())
    return (x * scale).round().to(torch.int64).cumsum(0).double() / scale


def expected_columns(w: Tensor, tau: Tensor) -> Tensor:
    """Σ π, 0-dim, for w [V], ∞ where a column is certain."""
    return (w / tau.clamp(min=torch.finfo(w.dtype).tiny)).clamp_(max=1.0).sum()


def is_sparse(expected: Tensor, vocabulary: int) -> Tensor:
    """A sample, or all columns: by the number expected, not the number drawn, which would be a bias. 0-dim bool."""
    return expected < BREAK_EVEN * vocabulary  # False if it is NaN: what is wrong with u is not hidden
