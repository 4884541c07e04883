"""What the sampled tokens say of the tail of a list, which the bucket of `formula.py` knows by its mass alone.

With y the sampled token, ℓ its log-prob in the student and ℓ_t in the teacher, r its importance ratio, c a baseline and w
the weight `SampledTail.tail_weight`, this is added to the value and to the gradient of reverse-bucket:

    value       w (r 1[y∉S] (ℓ − ℓ_t − ρ − c) + c p_tail)
    gradient    w (r 1[y∉S] (ℓ − ℓ_t − ρ − c) ∇ℓ + c ∇p_tail)

The factor of ∇ℓ is a constant. Both terms of c are needed: E 1[y∉S] ∇ℓ = ∇p_tail, which is not 0.
The mean over y, at w = 1, is the reverse KL over the whole vocabulary and its gradient (`fastkl.loss.top_k_kl_loss`), for
any finite ρ: how the teacher's tail is rounded changes the noise alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import ROWS
from fastkl.kernels.options import SampledTail
from fastkl.kernels.rows.interface import TailTokens
from fastkl.kernels.surrogate import Ratio, importance_ratio, log_ratio


class TailPerToken(NamedTuple):
    """By-products of a sampled tail, one entry per token, detached; 0, or False, where masked."""

    outside: Tensor  # bool: the list does not have the token
    list_mass: Tensor  # Σ_S p, the student's probability of the list, float32 (float64 for float64) as the next ones
    bucket_kl: Tensor  # what tail="bucket" gives
    gap: Tensor  # log p_y − log q_y − ρ of a token outside; 0 of others


ROWS_WITH_TAIL = ROWS + len(TailPerToken._fields)


class Addition(NamedTuple):
    """What is added to the bucket, [n] each."""

    value: Tensor
    token_slope: Tensor  # of ℓ; 0 where the list has the token
    mass_slope: Tensor  # of p_tail
    gap: Tensor  # ℓ − ℓ_t − ρ outside of the list, else 0


def ratio_of(tail: SampledTail, logprobs: Tensor, sampler_logprobs: Tensor | None) -> Ratio:
    """The importance ratio of tokens, 1 where the student itself sampled them."""
    return importance_ratio(log_ratio(logprobs, sampler_logprobs), tail.truncate_ratio)


def addition(
    tail: SampledTail, given: TailTokens, logprobs: Tensor, tail_ratio: Tensor, tail_mass: Tensor, outside: Tensor
) -> Addition:
    """For the tokens' log-probs, ρ and p_tail of the student, and which tokens the list does not have, [n] each.

    A token that the student cannot emit adds nothing, as in the sum that it stands for: 0 · log 0 = 0.
    """
    baseline = torch.zeros_like(logprobs) if given.baseline is None else given.baseline
    counted = outside & (logprobs != -torch.inf)
    gap = (log_ratio(logprobs, given.teacher_logprobs) - tail_ratio).where(counted, 0.0)
    ratio = ratio_of(tail, logprobs, given.sampler_logprobs)
    if tail.tail_weight == 0.0:  # whatever the gap is
        nothing = torch.zeros_like(gap)
        return Addition(nothing, nothing, nothing, gap)
    factor = (tail.tail_weight * (gap - baseline)).where(counted, 0.0)
    slope = (ratio.slope * factor).where(ratio.slope != 0, 0.0)
    mass_slope = tail.tail_weight * baseline
    return Addition(ratio.value * factor + mass_slope * tail_mass, slope, mass_slope, gap)
