"""The sparse backward in plain PyTorch, on any device: what `estimator.py` says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.gemm import add_weight_gradient, compute_dtype, hidden_gradient
from fastkl.kernels.options import Sparse
from fastkl.kernels.sparse.estimator import ColumnSample, Estimate, block_rows, centre, device_kind
from fastkl.kernels.sparse.probabilities import is_sparse, row_weights, solve

PROBED = 8  # after a flat block, one in so many of the next one's rows is looked at first
SCRATCH_BYTES = {"cpu": 2**21, "accelerator": 2**28}  # of squares; on a CPU they are to stay in its cache


class Columns(NamedTuple):
    """The kept ones of a block."""

    ids: Tensor  # [K] int64, ascending
    inverse: Tensor  # [K], 1 / π
    expected: Tensor  # 0-dim, Σ π: the mean of K over the draws


class PyTorchColumnSampler:
    """Draws the columns of one block after the other, and keeps count."""

    def __init__(self, sparse: Sparse, weight: Tensor, summed: bool) -> None:
        self.sparse, self.weight, self.summed = sparse, weight, summed
        self.dtype = compute_dtype(weight.dtype)
        self.generator = torch.Generator(weight.device).manual_seed(sparse.seed)
        self.centre = centre(weight)
        rows = max(1, SCRATCH_BYTES[device_kind(weight.device)] // (weight.shape[0] * self.dtype.itemsize))
        self.scratch_rows = min(rows, block_rows(weight.device))
        self.scratch: Tensor | None = None
        self.flat = False  # was the last block?
        self.kept = self.seen = 0  # entries of u
        self.variance, self.square = (weight.new_zeros((), dtype=self.dtype) for _ in range(2))

    def sample(
        self, gradient: Tensor, slope: Tensor, always: list[Tensor], factor: Tensor | None = None
    ) -> ColumnSample:
        columns = self.draw(gradient, slope, always, factor)
        if columns is None:
            return _ExactSample(self.weight, gradient, slope)
        return _SparseSample(self, gradient, slope, columns, self.estimate(gradient, columns))

    def draw(
        self, gradient: Tensor, slope: Tensor, always: list[Tensor], factor: Tensor | None = None
    ) -> Columns | None:
        """The columns of a block; None: all of them, which is exact. Synchronisations on an accelerator.

        Whether a block is flat, and so exact, is a function of its gradient and of those before it, never of what was
        drawn, which would be a bias. A few rows keep fewer columns than all: where they are flat, so are all.
        """
        vocabulary = gradient.shape[1]
        self.seen += gradient.numel()
        if self.flat and gradient.shape[0] > PROBED:
            probed = row_weights(slope[::PROBED], None if factor is None else factor[::PROBED])
            few = solve(self.sparse, self._column_squares(gradient[::PROBED], probed), [])
            if not is_sparse(few.expected, vocabulary):
                self._count_exact(gradient, few.total * (slope.shape[0] / probed.shape[0]))
                return None
        w, tau, total, lost, expected = solve(
            self.sparse, self._column_squares(gradient, row_weights(slope, factor)), always
        )
        self.flat = not is_sparse(expected, vocabulary)
        if self.flat:
            self._count_exact(gradient, total)
            return None
        # Midpoints of the generator's grid: never 0, so that 1 / π is bounded.
        u = torch.rand(w.shape, generator=self.generator, dtype=self.dtype, device=w.device).add_(2.0**-25)
        ids = (w > u.mul_(tau)).nonzero().squeeze(1)
        self.kept += gradient.shape[0] * ids.numel()
        self.square += total
        self.variance += lost
        return Columns(ids, (tau / w[ids]).clamp_(min=1.0), expected)

    def _count_exact(self, gradient: Tensor, total: Tensor) -> None:
        self.kept += gradient.numel()
        self.square += total

    def statistics(self) -> Tensor:
        """The fraction of u that was kept, and the expected relative error of û, [2]."""
        error = (self.variance / self.square.clamp(min=torch.finfo(self.dtype).tiny)).sqrt()
        return torch.stack([torch.full_like(error, self.kept / max(1, self.seen)), error])

    def estimate(self, gradient: Tensor, columns: Columns) -> Tensor:
        """û on the kept columns, [B, K]."""
        return (gradient.index_select(1, columns.ids) * columns.inverse).to(gradient.dtype)

    def hidden_gradient(self, gradient: Tensor, estimate: Tensor, ids: Tensor) -> Tensor:
        """û W [B, D] in the compute dtype, less what makes û sum to something else than u."""
        excess = estimate.sum(1, dtype=self.dtype)
        if self.summed:
            excess -= gradient.sum(1, dtype=self.dtype)
        out = hidden_gradient(estimate, self.weight.index_select(0, ids))
        return out.addr_(excess, self.centre, alpha=-1.0)

    def _column_squares(self, gradient: Tensor, weights: Tensor) -> Tensor:
        """w² [V], a part of the block's rows at a time."""
        out = weights.new_zeros(gradient.shape[1])
        if self.scratch is None:
            self.scratch = out.new_empty(self.scratch_rows, gradient.shape[1])
        for start in range(0, gradient.shape[0], self.scratch_rows):
            part = gradient[start : start + self.scratch_rows]
            squared = self.scratch[: part.shape[0]]
            if part.dtype == squared.dtype:
                torch.square(part, out=squared)
            else:
                squared.copy_(part).square_()
            out.addmv_(squared.t(), weights[start : start + self.scratch_rows])
        return out


class _ExactSample(NamedTuple):
    """A block of which all columns are kept."""

    weight: Tensor
    gradient: Tensor
    slope: Tensor

    def hidden_gradient(self) -> Tensor:
        return hidden_gradient(self.gradient, self.weight).mul_(self.slope[:, None])

    def add_to_weight_gradient(self, accumulator: Tensor, hidden: Tensor) -> None:
        add_weight_gradient(accumulator, self.gradient, hidden, self.slope)

    def estimate(self, rows: slice) -> Estimate | None:
        return None


class _SparseSample(NamedTuple):
    """A block of which some columns are kept."""

    sampler: PyTorchColumnSampler
    gradient: Tensor
    slope: Tensor
    columns: Columns
    kept: Tensor  # [B, K], û

    def hidden_gradient(self) -> Tensor:
        unit = self.sampler.hidden_gradient(self.gradient, self.kept, self.columns.ids)
        return unit.mul_(self.slope[:, None])

    def add_to_weight_gradient(self, accumulator: Tensor, hidden: Tensor) -> None:
        add_to_weight_gradient(accumulator, self.columns.ids, self.kept, hidden, self.slope)

    def estimate(self, rows: slice) -> Estimate | None:
        return Estimate(rows, self.columns.ids, self.kept, self.slope, float(self.columns.expected))


def merged(
    drawn: Iterable[tuple[slice, ColumnSample]], gradient: Tensor, slope: Tensor
) -> Iterator[tuple[slice, ColumnSample]]:
    """Blocks of a chunk with their samples, as they are drawn; neighbours that are exact as one, for larger products."""
    for exact, group in itertools.groupby(drawn, key=lambda block: isinstance(block[1], _ExactSample)):
        if not exact:
            yield from group
            continue
        blocks = list(group)
        rows = slice(blocks[0][0].start, blocks[-1][0].stop)
        yield rows, blocks[0][1]._replace(gradient=gradient[rows], slope=slope[rows])  # type: ignore[attr-defined]


def add_to_weight_gradient(accumulator: Tensor, ids: Tensor, estimate: Tensor, hidden: Tensor, scale: Tensor) -> None:
    """accumulator[ids] += ûᵀ (scale · hidden); accumulator [V, D] and scale [B] in the compute dtype, hidden [B, D]."""
    part = accumulator.new_empty(ids.shape[0], accumulator.shape[1])
    add_weight_gradient(part, estimate, hidden, scale, overwrite=True)
    accumulator.index_add_(0, ids, part)
