"""The metrics of a step: from its samples, and from its batches put together. `trainer/metrics.py` explains each name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from fastkl.trainer.data.arrays import total
from fastkl.trainer.data.samples import Sample

EXTREMES: dict[str, Callable[[float, float], float]] = {"min": min, "max": max}  # by the end of a metric's name


Means = dict[str, tuple[float, int]]
"""Totals by name, with the counts that they are divided by. Those of several processes add up."""

# Metrics that are one mean less another, which are no metrics themselves.
DIFFERENCES = {
    "given/forward_kl": ("given/teacher_logprob", "given/scored_logprob"),
    "context/gap": ("context/logprob", "context/plain_logprob"),
}


def rollout_means(samples: Sequence[Sample]) -> Means:
    """What the samples say before the update: of the student's own entropy, lengths and KLs, of the given likelihoods."""
    found: Means = {}
    own = [sample for sample in samples if not sample.given]
    given = [sample for sample in samples if sample.given]
    if own:
        logprobs, tokens = _sum(own, "sampler_logprobs")
        found["entropy"] = -logprobs, tokens
        found["completions/mean_length"] = tokens, len(own)
        found["completions/truncated_fraction"] = sum(sample.truncated for sample in own), len(own)
        if len(own[0].reference_logprobs):
            found["reference_kl"] = _gap(own, "reference_logprobs")
        if len(own[0].kl_baseline):
            found["advantages/kl_baseline"] = _sum(own, "kl_baseline")
    if given and len(given[0].old_logprobs):
        logprobs, tokens = _sum(given, "old_logprobs")
        found["given/nll"] = -logprobs, tokens
        if len(given[0].teacher_logprobs):
            found["given/teacher_logprob"], found["given/scored_logprob"] = (
                _sum(given, field, scored=True) for field in ("teacher_logprobs", "old_logprobs")
            )
    return found


def teacher_kl(samples: Sequence[Sample]) -> Means:
    """The one-sample estimate of the reverse KL, mean of ℓ_sampler − ℓ_teacher per token: of all and of each data set.

    Only of samples that the student wrote. Of a teacher with its own tokenizer, only of tokens in segments.
    """
    scored = [sample for sample in samples if len(sample.teacher_logprobs) and not sample.given]
    data_sets = sorted({sample.dataset for sample in scored if sample.dataset})
    parts = {"teacher_kl": scored} if scored else {}
    parts |= {f"teacher_kl/{name}": [sample for sample in scored if sample.dataset == name] for name in data_sets}
    return {key: _gap(part, "teacher_logprobs", scored=True) for key, part in parts.items()}


def mean_staleness(samples: Sequence[Sample]) -> Means:
    """How many steps older the weights that wrote the samples are than those that learn from them, per token."""
    own = [sample for sample in samples if not sample.given]
    if not own:
        return {}
    return {"staleness/mean": (sum(sample.staleness * sample.loss_tokens for sample in own), _tokens(own))}


def context_gap(samples: Sequence[Sample]) -> Means:
    """The mean of ℓ_teacher after its own prompt, less ℓ_teacher after the student's, where both are known."""
    both = [sample for sample in samples if len(sample.teacher_logprobs) and len(sample.plain_logprobs)]
    if not both:
        return {}
    return {"context/logprob": _sum(both, "teacher_logprobs"), "context/plain_logprob": _sum(both, "plain_logprobs")}


def as_metrics(parts: Sequence[Means]) -> dict[str, float]:
    """The metrics that the means of several processes are together."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        totals, counts = zip(*(part[name] for part in parts if name in part), strict=True)
        found[name] = sum(totals) / max(1, sum(counts))
    for name, (mean, less) in DIFFERENCES.items():
        if mean in found:
            found[name] = found.pop(mean) - found[less]
        found.pop(less, None)
    return found


class PolicyMetrics:
    """What a loss measured on the batches of a step. Means are over the tokens of the batches that have the metric.

    So where the teachers of a mixture are compared in two ways, those of one way do not count in the other's metrics.
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._shares: dict[str, float] = {}  # of the step's tokens; of means alone

    def add(self, metrics: Mapping[str, Tensor], token_share: float) -> None:
        """Those of a batch that has `token_share` of the step's tokens."""
        for name, value in metrics.items():
            is_mean = _ending(name) not in EXTREMES
            _merge(self._totals, name, value.item() * (token_share if is_mean else 1.0))
            if is_mean:
                _merge(self._shares, name, token_share)

    @staticmethod
    def together(parts: Sequence[PolicyMetrics]) -> dict[str, float]:
        """The metrics of all processes' batches."""
        totals, shares = dict[str, float](), dict[str, float]()
        for part in parts:
            for own, merged in ((part._totals, totals), (part._shares, shares)):
                for name, number in own.items():
                    _merge(merged, name, number)
        return {f"policy/{name}": number / shares.get(name, 1.0) for name, number in totals.items()}


def _merge(totals: dict[str, float], key: str, number: float) -> None:
    totals[key] = EXTREMES.get(_ending(key), lambda a, b: a + b)(totals[key], number) if key in totals else number


def _ending(key: str) -> str:
    return key.rsplit("_", 1)[-1]


def _sum(samples: Sequence[Sample], field: str, scored: bool = False) -> tuple[float, int]:
    """Of an array over the tokens that count, and how many those are; it is 0 elsewhere.

    `scored`: over those that a teacher can judge.
    """
    return sum(_total(sample, field, scored) for sample in samples), _tokens(samples, scored)


def _gap(samples: Sequence[Sample], field: str, scored: bool = False) -> tuple[float, int]:
    gaps = (_total(sample, "sampler_logprobs", scored) - _total(sample, field, scored) for sample in samples)
    return sum(gaps), _tokens(samples, scored)


def _total(sample: Sample, field: str, scored: bool) -> float:
    values = getattr(sample, field)
    return total(values[sample.scored] if scored and len(sample.segments) else values)


def _tokens(samples: Sequence[Sample], scored: bool = False) -> int:
    return int(sum(np.count_nonzero(sample.scored) if scored else sample.loss_tokens for sample in samples))
