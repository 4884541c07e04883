"""The policy-gradient objectives, token by token: loss and its derivative by the token's log-prob, in one place.

With ℓ the log-prob of the token under the policy being trained, ℓₒ under the old one, r = exp(ℓ − ℓₒ) and
A the advantage (a constant):

| method                  | loss                                    | d loss / dℓ                    |
|-------------------------|-----------------------------------------|--------------------------------|
| importance_sampling [1] | −r A                                    | −r A                           |
| reinforce [2]           | −A ℓ                                    | −A                             |
| ppo [3]                 | −min(r A, clip(r, 1 − low, 1 + high) A) | −r A where not clipped, else 0 |
| ppo, dual clip c [4]    | −max(−(the above), c A) where A < 0     | 0 where c A wins               |
| cispo [5]               | −sg(clip(r, 1 − low, 1 + high)) A ℓ     | −clip(r, …) A                  |

[1] Tinker's `importance_sampling`; [2] Williams 1992; [3] Schulman et al. 2017; [4] Ye et al. 2020; [5] MiniMax-M1, 2025.

The log-ratio is clamped to ±20 first. Beyond that r is a constant, e^±20: nothing overflows, and d r / dℓ is 0.

`truncate_ratio` = C caps the ratio at C in value and gradient but, unlike a PPO clip, never cuts a token out: r becomes
r · sg(min(1, C / r)) (truncated importance sampling). `reinforce` then takes the weight sg(min(r, C)) in place of 1.

The KL to a reference model is added with `ref_kl_coef`. It is estimated from the token alone, with d = ℓ_ref − ℓ (Schulman,
"Approximating KL divergence", 2020), and d is clamped to ±20 as the log-ratio is:

| ref_kl | k            | d k / dℓ |
|--------|--------------|----------|
| k1     | −d           | 1        |
| k2     | ½ d²         | −d       |
| k3     | e^d − d − 1  | 1 − e^d  |

With `ref_kl_ratio` it is r k, whose derivative is r (k + d k / dℓ) (DeepSeek-V3.2, 2025). No clip acts on this r;
`truncate_ratio` does.

A token whose ratio, neither clipped nor truncated, is outside `ratio_bounds` has no loss at all: neither the surrogate, nor
the KL to the reference, nor an entropy. It still counts where a mean divides (IcePop, Ring-1T, 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.options import Surrogate

LOG_RATIO_BOUND = 20.0  # e^20 = 5e8


class Ratio(NamedTuple):
    """Per token, [n] each."""

    value: Tensor  # truncated, but not clipped
    slope: Tensor  # d value / dℓ
    whole: Tensor  # before the truncation


class Estimate(NamedTuple):
    """Per token, [n] each."""

    value: Tensor
    slope: Tensor  # d value / dℓ


class SurrogateTerms(NamedTuple):
    """Per token, [n] each."""

    loss: Tensor
    slope: Tensor  # d loss / dℓ
    clipped: Tensor  # bool: a clip or the truncation changed this token's gradient
    outside: Tensor  # bool: the ratio is outside the bounds, and the token is to be left out


def log_ratio(logprobs: Tensor, others: Tensor | None) -> Tensor:
    """ℓ − ℓ′; 0 where they are equal, −inf included, and where the other policy is the current one (None)."""
    return torch.zeros_like(logprobs) if others is None else (logprobs - others).where(logprobs != others, 0.0)


def bounded(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def k3(log_ratios: Tensor) -> Tensor:
    """e^d − d − 1, without the cancellation of the terms where d is small."""
    return torch.expm1(log_ratios) - log_ratios


def importance_ratio(log_ratios: Tensor, truncate_ratio: float | None) -> Ratio:
    whole = torch.exp(bounded(log_ratios))
    slope = whole.where(~_beyond(log_ratios), 0.0)
    if truncate_ratio is None:
        return Ratio(whole, slope, whole)
    value = whole.clamp(max=truncate_ratio)
    return Ratio(value, torch.where(whole > value, value, slope), whole)


def outside_bounds(surrogate: Surrogate, ratio: Tensor) -> Tensor:
    """bool; a NaN is not outside, for it is not to vanish from the loss."""
    if surrogate.ratio_bounds is None:
        return torch.zeros_like(ratio, dtype=torch.bool)
    return (ratio < surrogate.ratio_bounds.low) | (ratio > surrogate.ratio_bounds.high)


def reference_kl(surrogate: Surrogate, logprobs: Tensor, ref_logprobs: Tensor, ratio: Ratio) -> Estimate:
    """The estimate of the KL to the reference, without its coefficient."""
    log_ratios = log_ratio(ref_logprobs, logprobs)
    d = bounded(log_ratios)
    if surrogate.ref_kl == "k1":
        value, slope = -d, torch.ones_like(d)
    elif surrogate.ref_kl == "k2":
        value, slope = 0.5 * d.square(), -d
    else:
        value, slope = k3(d), -torch.expm1(d)
    slope = slope.where(~_beyond(log_ratios), 0.0)
    if not surrogate.ref_kl_ratio:
        return Estimate(value, slope)
    return Estimate(ratio.value * value, ratio.slope * value + ratio.value * slope)


def surrogate_terms(
    surrogate: Surrogate,
    logprobs: Tensor,
    log_ratios: Tensor,
    advantages: Tensor,
    ref_logprobs: Tensor | None = None,
) -> SurrogateTerms:
    """Loss and slope per token for detached ℓ, ℓ − ℓₒ, A and ℓ_ref [n]; as though no ratio were outside the bounds.

    Where A is 0 the KL to the reference alone is left, however impossible the token or its ratio.
    """
    ratio, counted = importance_ratio(log_ratios, surrogate.truncate_ratio), advantages != 0
    loss, slope, clipped = _terms(surrogate, logprobs, ratio, advantages)
    loss, slope = loss.where(counted, 0.0), slope.where(counted, 0.0)
    if ref_logprobs is not None:
        kl, coef = reference_kl(surrogate, logprobs, ref_logprobs, ratio), surrogate.ref_kl_coef
        loss, slope = loss + coef * kl.value, slope + coef * kl.slope
    return SurrogateTerms(loss, slope, clipped, outside_bounds(surrogate, ratio.whole))


def _beyond(log_ratios: Tensor) -> Tensor:
    """Where the bound acts; not on NaN, which stays what it is."""
    return log_ratios.abs() > LOG_RATIO_BOUND


def _terms(surrogate: Surrogate, logprobs: Tensor, ratio: Ratio, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, slope, and whether a clip or the truncation changed the gradient."""
    truncated = ratio.whole > ratio.value
    clip = ratio.value.clamp(1.0 - surrogate.clip_low, 1.0 + surrogate.clip_high)
    if surrogate.method == "importance_sampling":
        return -ratio.value * advantages, -ratio.slope * advantages, truncated
    if surrogate.method == "reinforce":
        slope = -advantages if surrogate.truncate_ratio is None else -ratio.value * advantages
        return slope * logprobs, slope, truncated
    if surrogate.method == "cispo":
        slope = -clip * advantages
        return slope * logprobs, slope, truncated | (clip != ratio.value)
    gain = ratio.value * advantages
    best = torch.minimum(gain, clip * advantages)
    clipped = best < gain
    if surrogate.dual_clip is not None:
        floor = surrogate.dual_clip * advantages
        floored = (advantages < 0) & (best < floor)
        best, clipped = torch.where(floored, floor, best), clipped | floored
    return -best, torch.where(clipped, 0.0, -ratio.slope * advantages), truncated | clipped
