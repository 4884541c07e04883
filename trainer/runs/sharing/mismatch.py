"""How far the trainer's log-probs are from the sampler's, over the tokens of all processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.ranked import quantile


def mismatch_metrics(differences: Sequence[Tensor]) -> dict[str, float]:
    """Metrics `sampler_mismatch/*`, from ℓ − ℓ_sampler of this process's tokens before the update. All call it."""
    together = torch.cat([*differences, torch.empty(0)])
    sizes, difference = together.abs(), together.double()
    ratio = difference.exp()
    sums = processes.add(
        {
            "tokens": len(difference),
            "kl": (difference.expm1() - difference).sum().item(),
            "mean_abs": sizes.double().sum().item(),
            "outside_0.9_1.1": int(((ratio < 0.9) | (ratio > 1.1)).sum()),
        }
    )
    tokens = sums.pop("tokens")
    if not tokens:
        return {}
    means = {f"sampler_mismatch/{name}": value / tokens for name, value in sums.items()}
    return means | {"sampler_mismatch/p95_abs": quantile(sizes.numpy(), 0.95)}
