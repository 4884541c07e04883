"""How far the trainer's log-probs are from the sampler's, over the tokens of all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.ranked import quantile

FEWEST = 200  # tokens whose spread says how sure a mean is


def mismatch_metrics(pairs: Sequence[Tensor]) -> dict[str, float]:
    """Metrics `sampler_mismatch/*`, from ℓ and ℓ_sampler [m, 2] of this process's tokens before the update. All call it."""
    together = torch.cat([*pairs, torch.empty(0, 2)])
    sizes = (together[:, 0] - together[:, 1]).abs()
    logprobs, sampler = together.double().unbind(-1)
    difference = logprobs - sampler
    ratio = difference.exp()
    sums = processes.add(
        {
            "tokens": len(difference),
            "kl": (difference.expm1() - difference).sum().item(),
            "mean_abs": sizes.double().sum().item(),
            "outside_0.9_1.1": int(((ratio < 0.9) | (ratio > 1.1)).sum()),
        }
    )
    tokens = int(sums.pop("tokens"))
    if not tokens:
        return {}
    means = {f"sampler_mismatch/{name}": value / tokens for name, value in sums.items()}
    means["sampler_mismatch/p95_abs"] = quantile(sizes.numpy(), 0.95)
    return means if tokens < FEWEST else means | _missing(ratio, tokens) | _slope(logprobs, -difference, tokens)


def _missing(ratio: Tensor, tokens: int) -> dict[str, float]:
    """1 − mean r. Whatever a sampler has done to the probabilities, the mean of r over its tokens is what the trainer
    gives to tokens that it can draw: 1, but for a sampler that cuts some off."""
    mean, error = _mean(1 - ratio, tokens)
    return {"sampler_mismatch/missing": mean, "sampler_mismatch/missing_se": error}


def _slope(logprobs: Tensor, shift: Tensor, tokens: int) -> dict[str, float]:
    """The least-squares slope of ℓ_sampler − ℓ over ℓ, with White's standard error, which lets the spread depend on ℓ."""
    (centre, _), (shifted, _) = _mean(logprobs, tokens), _mean(shift, tokens)
    x, y = logprobs - centre, shift - shifted
    squares, products = processes.add({"xx": x.dot(x).item(), "xy": x.dot(y).item()}).values()
    if squares == 0:
        return {}
    slope = products / squares
    residuals = y.sub_(x, alpha=slope).mul_(x)
    (spread,) = processes.add({"sum": residuals.dot(residuals).item()}).values()
    return {"sampler_mismatch/slope": slope, "sampler_mismatch/slope_se": math.sqrt(spread) / squares}


def _mean(values: Tensor, tokens: int) -> tuple[float, float]:
    """Over all processes, with its standard error."""
    total, squares = processes.add({"sum": values.sum().item(), "squares": values.dot(values).item()}).values()
    mean = total / tokens
    return mean, math.sqrt(max(0.0, squares / tokens - mean * mean) / tokens)
