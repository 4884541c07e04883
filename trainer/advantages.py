"""Advantages of samples' tokens."""

from __future__ import annotations

import itertools

import torch

from fastkl.loss import reverse_kl_advantages
from fastkl.trainer.data.samples import Sample


def set_advantages(samples: list[Sample], *, coef: float, discount: float) -> None:
    """The reverse-KL advantages of every token, all samples end to end in one row; no sum crosses a sample's end."""
    lengths = [len(sample.ids) for sample in samples]
    own = [sample.old_logprobs or sample.sampler_logprobs for sample in samples]
    advantages = reverse_kl_advantages(
        torch.tensor(list(itertools.chain(*own))),
        torch.tensor(list(itertools.chain(*(sample.teacher_logprobs for sample in samples)))),
        torch.tensor(list(itertools.chain(*(sample.loss_mask for sample in samples)))),
        coef=coef,
        discount=discount,
        sequence_ids=torch.repeat_interleave(torch.tensor(lengths)),
    )
    for sample, row in zip(samples, advantages.split(lengths), strict=True):
        sample.advantages = row.tolist()
