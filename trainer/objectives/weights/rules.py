"""The rules that fastkl has: weights [n] float64 of each sample's counted tokens.

docs/objectives/token-weights.md has the evidence.

A token whose gap d = ℓ_sampler − ℓ_teacher is not known has the weight 1 in a rule about gaps: a given completion's, in
objectives that need no log-probs of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkl.trainer.config.losses.weights import WeightRule
from fastkl.trainer.objectives.weights.known import KnownTokens
from fastkl.trainer.objectives.weights.shares import largest

Weigh = Callable[[Sequence[KnownTokens]], Sequence[Tensor]]


def skip_first(samples: Sequence[KnownTokens], count: float) -> list[Tensor]:
    """0 for the first `count` tokens of a completion, then 1. The cookbook of Tinker does so in its recipe `sdft`."""
    return [(sample.positions >= count).double() for sample in samples]


def top_gap(samples: Sequence[KnownTokens], share: float) -> list[Tensor]:
    """1 for the `share` of the step's tokens with the largest |d|, 0 for the others.

    ⌈share · N⌉ of N tokens with a known gap; of equal gaps the first. It selects by the divergence alone, one of the two
    axes of `tip`, and by its one-sample estimate.
    """
    return _largest([None if sample.gaps is None else sample.gaps.abs() for sample in samples], samples, share)


def tip(samples: Sequence[KnownTokens], share: float) -> list[Tensor]:
    """1 for the `share` of the step's tokens with the largest h + δ − h δ, 0 for the others, as `top_gap` counts them.

    h is the student's entropy and δ is |d|, over the step's tokens, each cut at its 98th percentile and scaled to 0 … 1. Xu
    et al., "TIP: Token Importance in On-Policy Distillation" (2026, arXiv 2604.14084), have the KL of the distributions as
    δ, of which |d| is known before the update.
    """
    known = {
        index: (sample.student_entropies, sample.gaps.abs())
        for index, sample in enumerate(samples)
        if sample.gaps is not None and sample.student_entropies is not None
    }
    entropies, gaps = (_unit([pair[column] for pair in known.values()]) for column in (0, 1))
    scores = {index: h + gap - h * gap for index, h, gap in zip(known, entropies, gaps, strict=True)}
    return _largest([scores.get(index) for index in range(len(samples))], samples, share)


def drift(samples: Sequence[KnownTokens], gamma: float) -> list[Tensor]:
    """w_t = 1 + γ (1 − Σ_{j<t} |d_j| / Σ_j |d_j|), over a sample's own tokens: from 1 + γ down to no less than 1.

    Algorithm 1 of Xie et al., "On the Position Bias of On-Policy Distillation" (IW-OPD, 2026, arXiv 2606.22600), with γ =
    0.5. Where all gaps are 0, there is no drift: 1 + γ.
    """
    weights = []
    for sample in samples:
        if sample.gaps is None:
            weights.append(torch.ones(len(sample.tokens), dtype=torch.float64))
            continue
        size = sample.gaps.abs()
        total = size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        before = ((size.cumsum(0) - size) / total).clamp(0, 1)  # sums are rounded
        weights.append(1 + gamma * (1 - before))
    return weights


RULES: dict[str, Callable[[Sequence[KnownTokens], float], list[Tensor]]] = {
    "skip_first": skip_first,
    "top_gap": top_gap,
    "tip": tip,
    "drift": drift,
}


def built_in(rule: WeightRule) -> Weigh:
    return lambda samples: RULES[rule.name](samples, rule.number)


def _largest(scores: Sequence[Tensor | None], samples: Sequence[KnownTokens], share: float) -> list[Tensor]:
    """1 for the ⌈share · N⌉ largest of N scores, of equal ones the first; 0 for the others, 1 where there is no score."""
    weights = [torch.ones(len(sample.tokens), dtype=torch.float64) for sample in samples]
    known = [(weight, score) for weight, score in zip(weights, scores, strict=True) if score is not None]
    if known:
        chosen = largest(torch.cat([score for _, score in known]), share)
        for (weight, _), own in zip(known, chosen.split([len(weight) for weight, _ in known]), strict=True):
            weight.copy_(own)
    return weights


def _unit(parts: Sequence[Tensor]) -> list[Tensor]:
    """Values cut at the 98th percentile of all of them, the smallest then 0 and the largest 1."""
    if not parts:
        return []
    values = torch.cat(list(parts))
    if not len(values):
        return list(parts)
    values = values.clamp(max=values.sort().values[math.ceil(0.98 * len(values)) - 1])
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    return list(scaled.split([len(part) for part in parts]))
