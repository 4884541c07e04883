"""The sparse backward: unbiased gradients from a random subset of the vocabulary's columns.

The products of a chunk are u W and uᵀ h, u [n, V] the gradient of its scores, and nearly all columns of u are tail. For
each block of rows, with a_i the slope that multiplies row i of u,

    w_v = sqrt(Σ_i a_i² u_iv²)        π_v = min(1, w_v / τ), 1 for the tokens that the loss names
    keep v with probability π_v       û_iv = u_iv / π_v if v is kept, else 0

so that E û = u (Horvitz and Thompson 1952), and with it every gradient, for any u and any τ: the loss plays no part.
Columns are kept independently of each other, hence

    E Σ_i a_i² ‖û_i − u_i‖² = Σ_v w_v² (1/π_v − 1) = Σ_{w_v < τ} w_v (τ − w_v)

is known before anything is multiplied, and τ is solved from the relative error wanted (`probabilities.threshold`).
u sums to 0 over v, unless there is a soft-cap or a loss of the lse. û does not: any constant c [D] times the difference
of the two sums has expectation 0, and taking it off û W lowers the error. c is the mean of rows of W.

What the driver sees is a `ColumnSampler`. There are two: a plain one (`pytorch.py`) and one for accelerators (`triton.py`).
docs/losses/sparse-backward.md has the proof, measurements, and when not to use this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastkl.kernels.gemm import compute_dtype

# A sample belongs to a block of rows. Small blocks keep fewer columns, large ones multiply and select them at less cost.
BLOCK_ROWS = {"cpu": 128, "accelerator": 1024}
SPLIT = 128  # rows whose squares one program of an accelerator adds up
CENTRE_ROWS = 2**12  # at least


class ColumnSample(Protocol):
    """The gradients of one block of rows, from those of its columns that are kept."""

    def hidden_gradient(self) -> Tensor:
        """slope · û W [B, D], less what makes û sum to something else than u."""

    def add_to_weight_gradient(self, accumulator: Tensor, hidden: Tensor) -> None:
        """accumulator [V, D] += ûᵀ (slope · hidden); hidden [B, D]."""

    def estimate(self, rows: slice) -> Estimate | None:
        """What outlives the block; None: it is not worth keeping. A synchronisation on an accelerator."""


class ColumnSampler(Protocol):
    """Draws the columns of one block after the other, and keeps count."""

    def sample(
        self, gradient: Tensor, slope: Tensor, always: list[Tensor], factor: Tensor | None = None
    ) -> ColumnSample:
        """Of a block: gradient [B, V] in `gradient_dtype`, slope [B]; keeps ids in `always`.

        `factor` [B] is the part of the slope that makes u of the gradient (`rows/interface.py`). How much a row counts is
        what is left of its slope. The gradient may be overwritten, and what lies between its rows.
        """

    def statistics(self) -> Tensor:
        """The fraction of u that was kept, and the expected relative error of û, [2]."""


class Estimate(NamedTuple):
    """What a block of rows contributes to the weight's gradient."""

    rows: slice
    ids: Tensor  # [K]
    gradient: Tensor  # [B, K], û on its columns
    slope: Tensor  # [B]
    expected: float  # the mean of K over the draws


class Estimates:
    """Estimates that wait for the upstream gradient. Rows that have none, or no room, are computed again.

    There is room for as many numbers as the weight has. The decision uses the expected number of columns: using the drawn
    number would bias the estimate. A block that was computed exactly has no estimate.
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


def block_rows(device: torch.device) -> int:
    return BLOCK_ROWS[device_kind(device)]


def device_kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"


def blocks(n: int, device: torch.device) -> Iterator[slice]:
    step = block_rows(device)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def centre(weight: Tensor) -> Tensor:
    """c [D], in the compute dtype."""
    some = weight[:: max(1, weight.shape[0] // CENTRE_ROWS)]
    return some.mean(0, dtype=compute_dtype(weight.dtype))
