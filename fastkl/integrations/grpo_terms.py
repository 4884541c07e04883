"""The terms of Liger's GRPO losses, elementwise on log-probs. `s` is the loss with its settings.

With r = exp(ℓ − ℓ_old), or under the level "sequence" exp of the mean of ℓ − ℓ_old over a sequence, A the advantage:

    loss_type                            per token
    grpo, bnpo, dr_grpo, dapo, luspo     −min(min(r, δ) A, clip(r, 1 − ε_low, 1 + ε_high) A)
    cispo                                −min(r, ε_high) A ℓ                                 the ratio is a constant
    sapo                                 −4/τ σ(τ (r − 1)) A                                 τ by the sign of A
    vespo                                −φ A ℓ, φ = exp(λ + k log w − λ w)                  φ is a constant, w the ratio
                                                                                             of the sequence; k, λ by A

times the corrections, which vespo has in w; plus β k3 against the reference, times r if it is bias-corrected.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.distributed import all_reduce, get_world_size, is_available, is_initialized

from fastkl.kernels.surrogate import k3

if TYPE_CHECKING:
    from fastkl.integrations.liger_grpo import LigerFusedLinearGRPOLoss as Settings

LOG_RATIO_LIMIT = 20.0
SMALLEST_RATIO = 1e-8  # of vespo, of a sequence and of a correction


class Batch(NamedTuple):
    """What one call is given, in float32."""

    mask: Tensor  # [B, T]
    counted: Tensor  # bool [B, T], tokens that the loss looks at
    advantages: Tensor  # [B, 1]
    old: Tensor | None  # [B, T], log-probs
    ref: Tensor | None  # [B, T], log-probs; None without a KL to a reference
    corrections: Tensor | None  # [B, 1] or [B, T], ratios that multiply the loss

    @classmethod
    def of(
        cls,
        s: Settings,
        mask: Tensor,  # [B, T]
        advantages: Tensor,  # [B]
        old: Tensor | None,  # [B, T]
        ref: Tensor | None,  # [B, T]
        corrections: Tensor | None,  # [B], [B, 1] or [B, T]
    ) -> Batch:
        batch, length = mask.shape
        # Luspo weighs every token of a row by the number of those that are not masked.
        counted = (mask != 0).any(-1, keepdim=True).expand_as(mask) if s.loss_type == "luspo" else mask != 0
        if corrections is not None:
            corrections = corrections[:, None] if corrections.dim() == 1 else corrections
            if corrections.dim() != 2 or corrections.shape[0] != batch or corrections.shape[1] not in (1, length):
                raise ValueError(
                    f"vllm_is_ratio is {list(corrections.shape)}; expected [{batch}], [{batch}, 1] or [{batch}, {length}]"
                )
        if advantages.shape != (batch,):
            raise ValueError(f"advantages is {list(advantages.shape)}; expected one for each sequence, [{batch}]")
        optional = [None if t is None else t.detach().float() for t in (old, ref, corrections)]
        return cls(mask.float(), counted, advantages.detach().float()[:, None], *optional)


def token_weights(s: Settings, batch: Batch, items: Tensor | float | None) -> Tensor:
    """[B, T]: the loss is Σ weight · loss of a token. Luspo gives masked tokens the weight of their sequence too."""
    mask, (sequences, length) = batch.mask, batch.mask.shape
    lengths = mask.sum(-1, keepdim=True)
    if s.loss_type in ("grpo", "sapo"):
        return mask / (lengths.clamp(min=1.0) * sequences)
    if s.loss_type == "luspo":
        return (lengths / (sequences * length)).expand_as(mask)
    if s.loss_type == "bnpo":
        return mask / mask.sum().clamp(min=1.0)
    if s.loss_type == "dr_grpo":
        assert s.max_completion_length is not None
        return mask / (sequences * s.max_completion_length)
    return mask / _share(mask, items)


def _share(mask: Tensor, items: Tensor | float | None) -> Tensor:
    """The mean over processes of the tokens, 0-dim, at least 1. `items`: of all processes together."""
    several = is_available() and is_initialized()
    if items is not None:
        total = torch.as_tensor(items, dtype=mask.dtype, device=mask.device)
    else:
        total = mask.sum()
        if several:
            all_reduce(total)
    return (total / (get_world_size() if several else 1)).clamp(min=1.0)


def losses(s: Settings, logprobs: Tensor, batch: Batch) -> Tensor:
    """Per token [B, T], with gradients by `logprobs` [B, T]."""
    terms = _policy(s, logprobs, batch)
    if batch.corrections is not None and s.loss_type != "vespo":
        terms = terms * batch.corrections
    if batch.ref is not None:
        terms = terms + s.beta * _kl(s, logprobs, batch)
    return terms.expand_as(logprobs)


def metrics(s: Settings, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Means over tokens that are not masked: the KL estimate, if beta is not 0, and who is clipped."""

    def mean(values: Tensor) -> Tensor:
        return (values * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)

    ratio, up, down = _ratio(s, logprobs, batch), batch.advantages > 0, batch.advantages < 0
    if s.loss_type == "cispo":
        clipped = (ratio > s.epsilon_high) & up
    elif s.loss_type in ("sapo", "vespo"):
        clipped = torch.zeros_like(batch.mask, dtype=torch.bool)
    else:
        clipped = ((ratio < 1 - s.epsilon_low) & down) | ((ratio > 1 + s.epsilon_high) & up)
    found = mean(clipped)
    if s.beta == 0.0:
        return (found,)
    kl = torch.zeros_like(found) if batch.ref is None else mean(_kl(s, logprobs, batch))
    return kl, found


def _log_ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    """ℓ − ℓ_old [B, T], 0 where nothing counts. Without old log-probs 0, with a gradient."""
    old = logprobs.detach() if batch.old is None else batch.old
    return (logprobs - old).where(batch.counted, 0.0)


def _ratio(s: Settings, logprobs: Tensor, batch: Batch) -> Tensor:
    """[B, T], or [B, 1] under the level "sequence"."""
    log_ratio = _log_ratio(logprobs, batch)
    if s.importance_sampling_level == "token":
        return log_ratio.exp()
    lengths = batch.mask.sum(-1, keepdim=True).clamp(min=1.0)
    return ((log_ratio * batch.mask).sum(-1, keepdim=True) / lengths).exp()


def _policy(s: Settings, logprobs: Tensor, batch: Batch) -> Tensor:
    advantages, ratio = batch.advantages, _ratio(s, logprobs, batch)
    if s.loss_type == "cispo":
        return -ratio.detach().clamp(max=s.epsilon_high) * advantages * logprobs
    if s.loss_type == "vespo":
        return -_gamma_weights(s, logprobs.detach(), batch) * advantages * logprobs
    if s.loss_type == "sapo":
        temperature = torch.where(advantages > 0, s.sapo_temperature_pos, s.sapo_temperature_neg)
        return -4.0 / temperature * torch.sigmoid(temperature * (ratio - 1.0)) * advantages
    bounded = ratio if s.delta is None else ratio.clamp(max=s.delta)
    clipped = ratio.clamp(1.0 - s.epsilon_low, 1.0 + s.epsilon_high)
    return -torch.minimum(bounded * advantages, clipped * advantages)


def _gamma_weights(s: Settings, logprobs: Tensor, batch: Batch) -> Tensor:
    """φ [B, 1] of vespo, 1 where w is."""
    limits = {"min": math.log(SMALLEST_RATIO), "max": LOG_RATIO_LIMIT}
    log_ratio = _log_ratio(logprobs, batch).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_w = (log_ratio * batch.mask).sum(-1, keepdim=True)
    if batch.corrections is not None:
        log_w = log_w + batch.corrections.log().clamp(**limits).sum(-1, keepdim=True)
    log_w = log_w.clamp(**limits)
    up = batch.advantages >= 0
    k = torch.where(up, s.vespo_k_pos, s.vespo_k_neg)
    rate = torch.where(up, s.vespo_lambda_pos, s.vespo_lambda_neg).clamp(min=1e-4)
    weights = (rate + k * log_w - rate * log_w.exp()).exp()
    return weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _kl(s: Settings, logprobs: Tensor, batch: Batch) -> Tensor:
    """k3 of KL(policy ‖ reference) [B, T]."""
    assert batch.ref is not None
    gap = (batch.ref - logprobs).where(batch.counted, 0.0)
    return k3(gap) * _ratio(s, logprobs, batch) if s.use_bias_correction_kl else k3(gap)
