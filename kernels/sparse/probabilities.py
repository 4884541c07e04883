"""The probabilities that the columns of a block are kept with, and whether leaving any out is worth it (`estimator.py`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.options import Sparse

BREAK_EVEN = 0.5  # of the columns: from here on the product of all of them is no slower than that of those kept
SOLVED_COLUMNS = 2**13  # at least; τ is solved from every so many-th column
LEAST_SLOPE = 1e-3  # of the block's root mean square: bounds û in rows that hardly count and share the others' columns


def row_weights(slope: Tensor) -> Tensor:
    """What the squares of a row are counted by, [B]."""
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
    """From w² [V], which is overwritten; ids in `always` are certain."""
    total = squares.sum()
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
    w = w.sort().values
    first, second = w.cumsum(0), w.square().cumsum(0)
    index = torch.searchsorted(w * first - second, variance[None]).clamp_(1, w.shape[0]) - 1
    return ((variance + second[index]) / first[index].clamp(min=torch.finfo(w.dtype).tiny)).squeeze(0)


def expected_columns(w: Tensor, tau: Tensor) -> Tensor:
    """Σ π, 0-dim, for w [V], ∞ where a column is certain."""
    return (w / tau.clamp(min=torch.finfo(w.dtype).tiny)).clamp_(max=1.0).sum()


def is_sparse(expected: Tensor, vocabulary: int) -> Tensor:
    """A sample, or all columns: by the number expected, not the number drawn, which would be a bias. 0-dim bool."""
    return expected < BREAK_EVEN * vocabulary  # False if it is NaN: what is wrong with u is not hidden
