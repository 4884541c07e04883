"""What the losses return, and the statistics in it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import PerToken


class LossOutput(NamedTuple):
    """What every loss returns, whatever its options."""

    loss: Tensor  # 0-dim, or one entry per token with reduction="none"; differentiable
    # Log-prob of each token, float32 (float64 for float64), detached, 0 where masked; None where no tokens were given.
    logprobs: Tensor | None
    metrics: dict[str, Tensor]  # detached 0-dim tensors; reading one synchronises
    per_token: PerToken | None = None  # of a divergence that was asked for it


def sparse_metrics(statistics: Tensor | None) -> dict[str, Tensor]:
    """What a sparse backward pass says of itself (`ColumnSampler.statistics`)."""
    return {} if statistics is None else {"kept_fraction": statistics[0], "grad_error": statistics[1]}


def masked_mean(values: Tensor, active: Tensor) -> Tensor:
    """Mean over the active entries, 0 if there are none."""
    return values.where(active, 0.0).sum() / active.sum().clamp(min=1)


def masked_extreme(values: Tensor, active: Tensor, largest: bool) -> Tensor:
    """Largest or smallest active entry, 0 if there are none."""
    if values.numel() == 0:
        return values.new_zeros(())
    extreme = values.where(active, -torch.inf).amax() if largest else values.where(active, torch.inf).amin()
    return extreme.where(active.any(), 0.0)
