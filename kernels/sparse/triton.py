"""The sparse backward in Triton: what `estimator.py` says, without a synchronisation. The steps of a block are in
`steps.py`, their kernels in `triton_kernels.py`.

A block of B rows, u [B, V], goes through

    w² [V]            sums over splits of SPLIT rows each, then over the splits: one pass over u
    τ [1]             by `probabilities.solve`. Columns that are certain then have w = ∞; a block that is not worth
                      sampling has τ = −1, which keeps all columns as they are
    ids [K], 1 / π    columns with w > τ · rand, rand by Philox from (seed, block, column): a count per tile of columns, the
                      running sum of the counts, the list. K stays on the device
    û [B, K]          over u, in place, and each row's Σ û − Σ u
    dH                slope · (û W[ids] − (Σ û − Σ u) c): K is the inner length
    dW[ids]           += ûᵀ (slope · h): programs take one tile of [K, D] after the other

Same bits for the same seed, blocks and operands: no atomics, each sum has one order, each element of dW one owner, and the
blocks come one after the other. PyTorch's running sums on CUDA have no fixed order; those of integers need none. A block's
number counts the blocks of its call, so that chunk sizes that are multiples of a block give the same sample, up to what a
vendor's GEMM makes of another number of rows in u. PyTorch's generator, which `pytorch.PyTorchColumnSampler` has, gives
another sample.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.gemm import new_scores, scaled_rows
from fastkl.kernels.launch import check_device, check_rows
from fastkl.kernels.options import Sparse
from fastkl.kernels.sparse.estimator import Estimate, centre
from fastkl.kernels.sparse.probabilities import is_sparse, row_weights, solve
from fastkl.kernels.sparse.steps import (
    Selection,
    add_to_weight_gradient,
    column_squares,
    compact,
    hidden_gradient,
    select_columns,
)


class TritonColumnSampler:
    """`estimator.ColumnSampler` for CUDA and HIP devices. It overwrites the gradients that it is given."""

    def __init__(self, sparse: Sparse, weight: Tensor, summed: bool) -> None:
        check_device("weight is", weight)
        check_rows("weight", weight)
        self.sparse, self.weight, self.summed = sparse, weight, summed
        self.centre = centre(weight)
        self.block = self.seen = 0  # blocks, and entries of u
        self.kept = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self.variance, self.square = (weight.new_zeros((), dtype=torch.float32) for _ in range(2))

    def sample(
        self, gradient: Tensor, slope: Tensor, always: list[Tensor], factor: Tensor | None = None
    ) -> TritonColumnSample:
        """The sample of a block; `gradient` is û from here on."""
        squares = column_squares(gradient, row_weights(slope, factor))
        w, tau, total, lost, expected = solve(self.sparse, squares, always)
        worth_it = is_sparse(expected, w.shape[0])
        columns = select_columns(w, torch.where(worth_it, tau, -1.0).reshape(1), self.sparse.seed, self.block)
        self.block += 1
        self.seen += gradient.numel()
        self.kept += columns.kept * gradient.shape[0]
        self.square += total
        self.variance += torch.where(worth_it, lost, 0.0)
        excess = compact(gradient, columns, self.summed)
        expected = torch.where(worth_it, expected, float(w.shape[0]))
        return TritonColumnSample(self.weight, self.centre, gradient, slope, columns, excess, expected)

    def statistics(self) -> Tensor:
        error = (self.variance / self.square.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
        return torch.stack([self.kept[0].to(torch.float32) / max(1, self.seen), error])


class TritonColumnSample(NamedTuple):
    """`estimator.ColumnSample` of a block, good until the next one overwrites its gradient."""

    weight: Tensor  # [V, D]
    centre: Tensor  # [D]
    gradient: Tensor  # [B, V], û in its first K columns
    slope: Tensor  # [B]
    columns: Selection
    excess: Tensor  # [B], Σ û − Σ u
    expected: Tensor  # 0-dim, the mean of K over the draws

    def hidden_gradient(self) -> Tensor:
        return hidden_gradient(self.gradient, self.weight, self.columns, self.slope, self.excess, self.centre)

    def add_to_weight_gradient(self, accumulator: Tensor, hidden: Tensor) -> None:
        scaled = scaled_rows(hidden, self.slope).to(self.gradient.dtype).contiguous()
        add_to_weight_gradient(accumulator, self.gradient, scaled, self.columns)

    def estimate(self, rows: slice) -> Estimate:
        """A copy of û on its columns, all of them if they are all kept: to allocate it the host waits for K."""
        drawn, expected = torch.cat([self.columns.kept, self.expected.reshape(1)]).tolist()  # exact up to 2²⁴ columns
        count = int(drawn)
        ids = self.columns.ids[:count].to(torch.int64)
        kept = new_scores(self.gradient, self.gradient.shape[0], count, self.gradient.dtype).copy_(
            self.gradient[:, :count]
        )
        return Estimate(rows, ids, kept, self.slope, expected)
