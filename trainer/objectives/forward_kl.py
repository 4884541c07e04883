"""`loss.forward_kl_above`: the forward KL on top of an objective, where the teacher is unsure.

    L_t = L⁰_t + coef · 1[H(q_t) > τ] · KL(q_t ‖ p_t)        L⁰: the objective, H: the teacher's entropy in nats

Jin et al., "Entropy-Aware On-Policy Distillation of Language Models" (EOPD, 2026, arXiv 2603.07079), with τ = 0.8, coef =
1, 16 listed tokens, and the policy gradient on the reverse KL as L⁰.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.loss import LossOutput
from fastkl.trainer.config.loss import LossConfig


def plus_forward_kl(
    output: LossOutput,
    entropies: Tensor,  # [n]
    weights: Tensor | None,  # [n]
    forward_kl: Callable[[Tensor], LossOutput],
    config: LossConfig,
) -> LossOutput:
    """An objective's output with the forward KL on top; that of a mask [n], reduced alike, costs its own rows alone."""
    if config.forward_kl_above is None:
        return output
    unsure = entropies > config.forward_kl_above
    weights = torch.ones_like(entropies) if weights is None else weights
    added = forward_kl(weights * unsure)
    share = (unsure & (weights != 0)).sum() / (weights != 0).sum().clamp(min=1)
    (mean,) = (value for name, value in added.metrics.items() if name.endswith("_mean"))
    metrics = {"unsure_fraction": share, "added_forward_kl": mean * share}
    return output._replace(
        loss=output.loss + config.forward_kl_coef * added.loss, metrics={**output.metrics, **metrics}
    )
