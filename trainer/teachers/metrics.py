"""How far the student's samples are from their teachers."""

from __future__ import annotations

from collections.abc import Sequence

from fastkl.trainer.data.samples import Sample


def teacher_kl(samples: Sequence[Sample]) -> dict[str, float]:
    """The one-sample estimate of the reverse KL: mean of ℓ_sampler − ℓ_teacher per token, of all and of each data set.

    Only of samples that the student wrote.
    """
    scored = [sample for sample in samples if sample.teacher_logprobs and not sample.given]
    names = sorted({sample.dataset for sample in scored})
    parts = {"teacher_kl": scored} if scored else {}
    parts |= {f"teacher_kl/{name}": [sample for sample in scored if sample.dataset == name] for name in names if name}
    return {key: _mean_gap(part) for key, part in parts.items()}


def _mean_gap(samples: Sequence[Sample]) -> float:
    gap = sum(sum(sample.sampler_logprobs) - sum(sample.teacher_logprobs) for sample in samples)
    return gap / max(1, sum(sample.loss_tokens for sample in samples))
