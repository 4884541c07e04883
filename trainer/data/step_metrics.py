"""The metrics of a step: from its samples, and from its batches put together. `trainer/metrics.py` explains each name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastkl.trainer.data.arrays import total
from fastkl.trainer.data.samples import Sample

EXTREMES: dict[str, Callable[[float, float], float]] = {"min": min, "max": max}  # by the end of a metric's name


def rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """What the samples say before the update: of the student's own entropy, lengths and KLs, of the given likelihoods."""
    metrics = {}
    own = [sample for sample in samples if not sample.given]
    given = [sample for sample in samples if sample.given]
    if own:
        metrics["entropy"] = -_per_token(own, "sampler_logprobs")
        metrics["completions/mean_length"] = sum(sample.loss_tokens for sample in own) / len(own)
        metrics["completions/truncated_fraction"] = sum(sample.truncated for sample in own) / len(own)
        if len(own[0].reference_logprobs):
            metrics["reference_kl"] = _gap_per_token(own, "reference_logprobs")
        if len(own[0].kl_baseline):
            metrics["advantages/kl_baseline"] = _per_token(own, "kl_baseline")
    if given and len(given[0].old_logprobs):
        metrics["given/nll"] = -_per_token(given, "old_logprobs")
        if len(given[0].teacher_logprobs):
            theirs, ours = (_per_token(given, field, scored=True) for field in ("teacher_logprobs", "old_logprobs"))
            metrics["given/forward_kl"] = theirs - ours
    return metrics


def teacher_kl(samples: Sequence[Sample]) -> dict[str, float]:
    """The one-sample estimate of the reverse KL, mean of ℓ_sampler − ℓ_teacher per token: of all and of each data set.

    Only of samples that the student wrote. Of a teacher with its own tokenizer, only of tokens in segments.
    """
    scored = [sample for sample in samples if len(sample.teacher_logprobs) and not sample.given]
    data_sets = sorted({sample.dataset for sample in scored if sample.dataset})
    parts = {"teacher_kl": scored} if scored else {}
    parts |= {f"teacher_kl/{name}": [sample for sample in scored if sample.dataset == name] for name in data_sets}
    return {key: _gap_per_token(part, "teacher_logprobs", scored=True) for key, part in parts.items()}


def staleness(samples: Sequence[Sample]) -> dict[str, float]:
    """How many steps older the weights that wrote the samples are than those that learn from them."""
    own = [sample for sample in samples if not sample.given]
    if not own:
        return {}
    steps = sum(sample.staleness * sample.loss_tokens for sample in own)
    return {"staleness/mean": steps / _tokens(own), "staleness/max": max(sample.staleness for sample in own)}


def context_gap(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of ℓ_teacher after its own prompt, less ℓ_teacher after the student's, where both are known."""
    both = [sample for sample in samples if len(sample.teacher_logprobs) and len(sample.plain_logprobs)]
    if not both:
        return {}
    return {"context/gap": _per_token(both, "teacher_logprobs") - _per_token(both, "plain_logprobs")}


def mismatch_metrics(differences: Sequence[Tensor]) -> dict[str, float]:
    """How far the trainer's log-probs are from the sampler's, before the update: from ℓ − ℓ_sampler of the tokens."""
    difference = torch.cat([*differences, torch.empty(0)]).double()
    if not len(difference):
        return {}
    ratio, sizes = difference.exp(), difference.abs()
    return {
        "sampler_mismatch/kl": (difference.expm1() - difference).mean().item(),
        "sampler_mismatch/mean_abs": sizes.mean().item(),
        "sampler_mismatch/p95_abs": _quantile(sizes, 0.95),
        "sampler_mismatch/outside_0.9_1.1": ((ratio < 0.9) | (ratio > 1.1)).float().mean().item(),
    }


def _quantile(values: Tensor, share: float) -> float:
    """As `torch.quantile`, which refuses more than 2²⁴ values: between the two nearest, in proportion."""
    place = share * (len(values) - 1)
    nearest = [math.floor(place), math.ceil(place)]
    below, above = np.partition(values.numpy(), nearest)[nearest].tolist()
    return float(below + (above - below) * (place % 1))


def add_policy_metrics(totals: dict[str, float], metrics: dict[str, Tensor], token_share: float) -> None:
    """Adds what a loss measured on a batch that has `token_share` of the step's tokens; extremes are not averaged."""
    for name, value in metrics.items():
        key, number = f"policy/{name}", value.item()
        _merge(totals, key, number if _ending(key) in EXTREMES else number * token_share)


def merge_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The processes' shares put together."""
    merged: dict[str, float] = {}
    for part in parts:
        for key, number in part.items():
            _merge(merged, key, number)
    return merged


def _merge(totals: dict[str, float], key: str, number: float) -> None:
    totals[key] = EXTREMES.get(_ending(key), lambda a, b: a + b)(totals[key], number) if key in totals else number


def _ending(key: str) -> str:
    return key.rsplit("_", 1)[-1]


def _per_token(samples: Sequence[Sample], field: str, scored: bool = False) -> float:
    """The mean of an array over the tokens that count; it is 0 elsewhere. `scored`: over those that a teacher can judge."""
    return sum(_total(sample, field, scored) for sample in samples) / _tokens(samples, scored)


def _gap_per_token(samples: Sequence[Sample], field: str, scored: bool = False) -> float:
    gaps = (_total(sample, "sampler_logprobs", scored) - _total(sample, field, scored) for sample in samples)
    return sum(gaps) / _tokens(samples, scored)


def _total(sample: Sample, field: str, scored: bool) -> float:
    values = getattr(sample, field)
    return total(values[sample.scored] if scored and len(sample.segments) else values)


def _tokens(samples: Sequence[Sample], scored: bool = False) -> int:
    counts = (np.count_nonzero(sample.scored) if scored else sample.loss_tokens for sample in samples)
    return max(1, int(sum(counts)))
