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

`truncate_ratio` = C caps the ratio at C in value and gradient but, unlike a PPO clip, never cuts a token out: r becomes
r · sg(min(1, C / r)) (truncated importance sampling). `reinforce` then takes the weight sg(min(r, C)) in place of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.options import Surrogate


class SurrogateTerms(NamedTuple):
    """Per token, [n] each."""

    loss: Tensor
    slope: Tensor  # d loss / dℓ
    clipped: Tensor  # bool: a clip or the truncation changed this token's gradient


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """exp(ℓ − ℓₒ), untruncated; 1 where the old policy is the current one (None)."""
    return torch.ones_like(logprobs) if old_logprobs is None else torch.exp(logprobs - old_logprobs)


def surrogate_terms(
    surrogate: Surrogate, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor
) -> SurrogateTerms:
    """Loss and slope per token for detached ℓ, ℓₒ and A [n]; 0 where A is 0, however impossible the token or its ratio."""
    terms = _terms(surrogate, logprobs, old_logprobs, advantages)
    counted = advantages != 0
    return SurrogateTerms(terms.loss.where(counted, 0.0), terms.slope.where(counted, 0.0), terms.clipped)


def _terms(surrogate: Surrogate, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor) -> SurrogateTerms:
    ratio = importance_ratio(logprobs, old_logprobs)
    truncated = torch.zeros_like(ratio, dtype=torch.bool)
    if surrogate.truncate_ratio is not None:
        truncated = ratio > surrogate.truncate_ratio
        ratio = ratio.clamp(max=surrogate.truncate_ratio)
    clip = ratio.clamp(1.0 - surrogate.clip_low, 1.0 + surrogate.clip_high)
    if surrogate.method == "importance_sampling":
        return SurrogateTerms(-ratio * advantages, -ratio * advantages, truncated)
    if surrogate.method == "reinforce":
        slope = -advantages if surrogate.truncate_ratio is None else -ratio * advantages
        return SurrogateTerms(slope * logprobs, slope, truncated)
    if surrogate.method == "cispo":
        slope = -clip * advantages
        return SurrogateTerms(slope * logprobs, slope, truncated | (clip != ratio))
    gain = ratio * advantages
    best = torch.minimum(gain, clip * advantages)
    clipped = best < gain
    if surrogate.dual_clip is not None:
        floor = surrogate.dual_clip * advantages
        floored = (advantages < 0) & (best < floor)
        best, clipped = torch.where(floored, floor, best), clipped | floored
    return SurrogateTerms(-best, torch.where(clipped, 0.0, -gain), truncated | clipped)
