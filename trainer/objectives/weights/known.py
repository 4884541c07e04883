"""What is known of a step's tokens before the update: what their weights can be made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastkl.loss import TopK
from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.runs.sharing.records import Record


@dataclass(frozen=True)
class KnownTokens:
    """The counted tokens of a sample; tensors [n] on the CPU, float64 where nothing else is said."""

    tokens: Tensor  # int64
    positions: Tensor  # int64: 0 is the first token after the prompt; what an environment wrote takes places too
    sampler_logprobs: Tensor | None  # of a given completion the student's; None where nothing asked for them
    teacher_logprobs: Tensor | None  # None without a teacher
    student_entropies: Tensor | None  # nats; None where no forward pass before the update tells them
    teacher_entropies: Tensor | None  # of its listed tokens and the rest as one, nats; None where no list was asked for
    prompt_index: int  # equal for the samples of one prompt
    dataset: str  # of a mixture
    given: bool  # the completion stands in the data
    truncated: bool
    reward: float | None

    @property
    def gaps(self) -> Tensor | None:
        """d = ℓ_sampler − ℓ_teacher, in nats; None where one of them is not known."""
        if self.sampler_logprobs is None or self.teacher_logprobs is None:
            return None
        return self.sampler_logprobs - self.teacher_logprobs


def known_tokens(sample: Sample) -> KnownTokens:
    mask = sample.loss_mask

    def counted(values: Array) -> Tensor | None:
        return torch.from_numpy(values[mask].astype(np.float64)) if len(values) else None

    return KnownTokens(
        tokens=torch.from_numpy(sample.ids[mask].astype(np.int64)),
        positions=torch.from_numpy(np.flatnonzero(mask) - sample.prompt_length),
        sampler_logprobs=counted(sample.old_logprobs if sample.given else sample.sampler_logprobs),
        teacher_logprobs=counted(sample.teacher_logprobs),
        student_entropies=counted(sample.student_entropies),
        teacher_entropies=None if sample.teacher_top_k is None else list_entropies(sample.teacher_top_k).double(),
        prompt_index=sample.prompt_index,
        dataset=sample.dataset,
        given=sample.given,
        truncated=sample.truncated,
        reward=sample.reward,
    )


NARROW = {torch.int64: torch.int32, torch.float64: torch.float32}  # as samples have the same numbers


def as_record(known: KnownTokens) -> Record:
    """On the way to another process, in as few bytes as samples have."""
    fields = vars(known)
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in fields.items() if name not in tensors}
    return Record((numbers, list(tensors)), [value.to(NARROW[value.dtype]).numpy() for value in tensors.values()])


def as_known(record: Record) -> KnownTokens:
    numbers, names = record.head
    wide = {narrow: dtype for dtype, narrow in NARROW.items()}
    tensors = map(torch.from_numpy, record.arrays)
    fields = numbers | {name: own.to(wide[own.dtype]) for name, own in zip(names, tensors, strict=True)}
    return KnownTokens(**fields)


def list_entropies(likeliest: TopK) -> Tensor:
    """−Σ q log q [n] of listed tokens [n, k] and the rest as one outcome: at most the entropy of the whole vocabulary."""
    listed = likeliest.logprobs.exp().where(likeliest.ids >= 0, 0.0)
    outcomes = torch.cat([listed, (1 - listed.sum(-1, keepdim=True)).clamp(min=0)], -1)
    return -torch.xlogy(outcomes, outcomes).sum(-1)
