"""The sampled backward: unbiased gradients from a random subset of the vocabulary's columns.

The products of a chunk are u W and uᵀ h, u [n, V] the gradient of its scores, and nearly all columns of u are tail. For
each block of rows, with a_i the slope that multiplies row i of u,

    w_v = sqrt(Σ_i a_i² u_iv²)        π_v = min(1, w_v / τ), 1 for the tokens that the loss names
    keep v with probability π_v       û_iv = u_iv / π_v if v is kept, else 0

so that E û = u (Horvitz and Thompson 1952), and with it every gradient, for any u and any τ: the loss plays no part.
Columns are kept independently of each other, hence

    E Σ_i a_i² ‖û_i − u_i‖² = Σ_v w_v² (1/π_v − 1) = Σ_{w_v < τ} w_v (τ − w_v)

is known before anything is multiplied, and τ is solved from the relative error wanted (`threshold`). u sums to 0 over v, up
to a soft-cap, and û does not: any constant c [D] times the difference has expectation 0, and taking it off u W lowers the
error. c is the mean of rows of W. Here is the plain version, and the rules that it shares with that of accelerators
(`sampled_triton.py`); `BlockSampler` is what the driver sees of either.
docs/sampled-backward.md has the proof, measurements, and when not to use this.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from fastkl.kernels.gemm import add_weight_gradient, compute_dtype, hidden_gradient

Backward = Literal["exact", "sampled"]
BACKWARDS: tuple[str, ...] = get_args(Backward)

# A sample belongs to a block of rows. Small blocks keep fewer columns, large ones multiply and select them at less cost.
BLOCK_ROWS = {"cpu": 128, "accelerator": 1024}
BREAK_EVEN = 0.5  # of the columns: from here on the product of all of them is no slower than that of those kept
PROBED = 8  # after a flat block, one in so many of the next one's rows is looked at first
SCRATCH_BYTES = {"cpu": 2**21, "accelerator": 2**28}  # of squares; on a CPU they are to stay in its cache
SPLIT = 128  # rows whose squares one program of an accelerator adds up
SOLVED_COLUMNS = 2**13  # at least; τ is solved from every so many-th column
CENTRE_ROWS = 2**12  # at least
LEAST_SLOPE = (
    1e-3  # of the block's root mean square: bounds û in rows that hardly count, which share the others' columns
)


class Sampling(NamedTuple):
    """How the columns are sampled."""

    grad_error: float  # expected relative error, from which each block's τ is solved
    epsilon: float | None  # τ itself in its place
    seed: int


class Columns(NamedTuple):
    """The kept ones of a block."""

    ids: Tensor  # [K] int64, ascending
    inverse: Tensor  # [K], 1 / π
    expected: Tensor  # 0-dim, Σ π: the mean of K over the draws


class Estimate(NamedTuple):
    """What a block of rows contributes to the weight's gradient."""

    rows: slice
    ids: Tensor  # [K]
    gradient: Tensor  # [B, K], û on its columns
    slope: Tensor  # [B]
    expected: float  # the mean of K over the draws


class Estimates:
    """Estimates that wait for the upstream gradient, as many as there is room for; the other rows are computed again.

    They take up to the size of the weight. By the columns expected, not those drawn: a block that is drawn again because
    many were is a bias. A block that was computed exactly has none.
    """

    def __init__(self, weight: Tensor) -> None:
        self.room = float(weight.numel())
        self.kept: list[Estimate] = []
        self.others: list[slice] = []

    def take(self, rows: slice, estimate: Estimate | None) -> None:
        size = 0.0 if estimate is None else estimate.gradient.shape[0] * estimate.expected
        if estimate is None or size > self.room:
            self.others.append(rows)
            return
        self.room -= size
        self.kept.append(estimate)


class Sample(Protocol):
    """The gradients of one block of rows, from those of its columns that are kept."""

    def hidden_gradient(self) -> Tensor:
        """slope · û W [B, D], less what makes û sum to something else than u."""

    def add_to_weight_gradient(self, accumulator: Tensor, hidden: Tensor) -> None:
        """accumulator [V, D] += ûᵀ (slope · hidden); hidden [B, D]."""

    def estimate(self, rows: slice) -> Estimate | None:
        """What outlives the block; None: it is not worth keeping. A synchronisation on an accelerator."""


class BlockSampler(Protocol):
    """Draws the columns of one block after the other, and keeps count."""

    def sample(self, gradient: Tensor, slope: Tensor, always: list[Tensor]) -> Sample:
        """Of a block: gradient [B, V] in `gradient_dtype`, which it may overwrite, slope [B]; keeps ids in `always`."""

    def statistics(self) -> Tensor:
        """The fraction of u that was kept, and the expected relative error of û, [2]."""


def block_rows(device: torch.device) -> int:
    return BLOCK_ROWS[_kind(device)]


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"


def blocks(n: int, device: torch.device) -> Iterator[slice]:
    step = block_rows(device)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


class Solution(NamedTuple):
    """The probabilities of a block's columns, min(1, w / τ); all but w are 0-dim."""

    w: Tensor  # [V], ∞ where a column is certain
    tau: Tensor
    total: Tensor  # Σ w² over all columns
    lost: Tensor  # the variance of û
    expected: Tensor  # Σ π


def solve(sampling: Sampling, squares: Tensor, always: list[Tensor]) -> Solution:
    """From w² [V], which is overwritten; ids in `always` are certain."""
    total = squares.sum()
    for ids in always:
        squares.index_fill_(0, ids, 0.0)
    w = squares.sqrt_()
    tau = block_threshold(sampling, w, total)
    lost = torch.dot(w, (tau - w).clamp_(min=0.0))
    for ids in always:
        w.index_fill_(0, ids, torch.inf)
    return Solution(w, tau, total, lost, expected_columns(w, tau))


class Sampler:
    """Draws the columns of one block after the other, and keeps count."""

    def __init__(self, sampling: Sampling, weight: Tensor, capped: bool) -> None:
        self.sampling, self.weight, self.capped = sampling, weight, capped
        self.dtype = compute_dtype(weight.dtype)
        self.generator = torch.Generator(weight.device).manual_seed(sampling.seed)
        self.centre = centre(weight)
        rows = max(1, SCRATCH_BYTES[_kind(weight.device)] // (weight.shape[0] * self.dtype.itemsize))
        self.scratch_rows = min(rows, block_rows(weight.device))
        self.scratch: Tensor | None = None
        self.flat = False  # was the last block?
        self.kept = self.seen = 0  # entries of u
        self.variance, self.square = (weight.new_zeros((), dtype=self.dtype) for _ in range(2))

    def sample(self, gradient: Tensor, slope: Tensor, always: list[Tensor]) -> Sample:
        columns = self.draw(gradient, slope, always)
        if columns is None:
            return _Exact(self.weight, gradient, slope)
        return _Sparse(self, gradient, slope, columns, self.estimate(gradient, columns))

    def draw(self, gradient: Tensor, slope: Tensor, always: list[Tensor]) -> Columns | None:
        """The columns of a block; None: all of them, which is exact. Synchronisations on an accelerator.

        Whether a block is flat, and so exact, is a function of its gradient and of those before it, never of what was
        drawn, which would be a bias. A few rows keep fewer columns than all: where they are flat, so are all.
        """
        vocabulary = gradient.shape[1]
        self.seen += gradient.numel()
        if self.flat and gradient.shape[0] > PROBED:
            probed = slope[::PROBED]
            few = solve(self.sampling, self._column_squares(gradient[::PROBED], probed), [])
            if not is_sparse(few.expected, vocabulary):
                self._count_exact(gradient, few.total * (slope.shape[0] / probed.shape[0]))
                return None
        w, tau, total, lost, expected = solve(self.sampling, self._column_squares(gradient, slope), always)
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
        if self.capped:
            excess -= gradient.sum(1, dtype=self.dtype)
        out = hidden_gradient(estimate, self.weight.index_select(0, ids))
        return out.addr_(excess, self.centre, alpha=-1.0)

    def _column_squares(self, gradient: Tensor, slope: Tensor) -> Tensor:
        """w² [V], a part of the block's rows at a time."""
        weights = row_weights(slope)
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


class _Exact(NamedTuple):
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


def merged(drawn: Iterable[tuple[slice, Sample]], gradient: Tensor, slope: Tensor) -> Iterator[tuple[slice, Sample]]:
    """Blocks of a chunk with their samples, as they are drawn; neighbours that are exact as one, for larger products."""
    for exact, group in itertools.groupby(drawn, key=lambda found: isinstance(found[1], _Exact)):
        if not exact:
            yield from group
            continue
        found = list(group)
        rows = slice(found[0][0].start, found[-1][0].stop)
        yield rows, found[0][1]._replace(gradient=gradient[rows], slope=slope[rows])  # type: ignore[attr-defined]


class _Sparse(NamedTuple):
    """A block of which some columns are kept."""

    sampler: Sampler
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


def row_weights(slope: Tensor) -> Tensor:
    """What the squares of a row are counted by, [B]."""
    weights = slope.square()
    return weights.add_(LEAST_SLOPE**2 * weights.mean())


def centre(weight: Tensor) -> Tensor:
    """c [D], in the compute dtype."""
    some = weight[:: max(1, weight.shape[0] // CENTRE_ROWS)]
    return some.mean(0, dtype=compute_dtype(weight.dtype))


def block_threshold(sampling: Sampling, w: Tensor, total: Tensor) -> Tensor:
    """τ of a block, 0-dim: for w [V], 0 where a column is certain, and `total` = Σ w² over all columns."""
    if sampling.epsilon is not None:
        return w.new_full((), sampling.epsilon)
    some = w[:: max(1, w.shape[0] // SOLVED_COLUMNS)]
    return threshold(some, sampling.grad_error**2 * total * (some.shape[0] / w.shape[0]))


def expected_columns(w: Tensor, tau: Tensor) -> Tensor:
    """Σ π, 0-dim, for w [V], ∞ where a column is certain."""
    return (w / tau.clamp(min=torch.finfo(w.dtype).tiny)).clamp_(max=1.0).sum()


def is_sparse(expected: Tensor, vocabulary: int) -> Tensor:
    """A sample, or all columns: by the number expected, not the number drawn, which would be a bias. 0-dim bool."""
    return expected < BREAK_EVEN * vocabulary  # False if it is NaN: what is wrong with u is not hidden


def threshold(w: Tensor, variance: Tensor) -> Tensor:
    """The τ with Σ_{w < τ} w (τ − w) = `variance`, 0-dim, for w ≥ 0 [V].

    The left side grows with τ and is linear in it between two neighbours of w: sums over the sorted w find the place.
    """
    w = w.sort().values
    first, second = w.cumsum(0), w.square().cumsum(0)
    place = torch.searchsorted(w * first - second, variance[None]).clamp_(1, w.shape[0]) - 1
    return ((variance + second[place]) / first[place].clamp(min=torch.finfo(w.dtype).tiny)).squeeze(0)


def add_to_weight_gradient(accumulator: Tensor, ids: Tensor, estimate: Tensor, hidden: Tensor, scale: Tensor) -> None:
    """accumulator[ids] += ûᵀ (scale · hidden); accumulator [V, D] and scale [B] in the compute dtype, hidden [B, D]."""
    part = accumulator.new_empty(ids.shape[0], accumulator.shape[1])
    add_weight_gradient(part, estimate, hidden, scale, overwrite=True)
    accumulator.index_add_(0, ids, part)
