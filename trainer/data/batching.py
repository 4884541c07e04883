"""From samples to tensors: which samples share a forward pass, and how they are laid out in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkl.loss import TopK
from fastkl.trainer.data.samples import Sample

Layout = Literal["packed", "padded", "single"]  # single: one sequence in a forward pass
PAD_ID = 0  # any valid id: padding is masked out of the attention and out of the loss


class Parts(NamedTuple):
    """What a loss takes as `mask` and `normalizer`."""

    mask: Tensor | None  # [n] float32; 0 where a token does not count, None where all count the same
    normalizer: float


@dataclasses.dataclass
class Batch:
    """The tensors of one forward pass. Per-token tensors have one entry per token that counts, in the samples' order."""

    samples: list[Sample]
    inputs: dict[str, Tensor]  # input_ids, position_ids [B, T], and attention_mask [B, T] where padded
    rows: Tensor  # [n] which hidden state, of [B · T], predicts each counted token
    tokens: Tensor  # [n]
    scattered: set[str] = dataclasses.field(default_factory=set)  # the samples' fields that were written from it

    def per_token(self, field: str) -> Tensor:
        """A list of the samples (`advantages`, `sampler_logprobs`, …) as a float32 tensor [n]."""
        return torch.tensor(self._counted(field), dtype=torch.float32, device=self.tokens.device)

    def _counted(self, field: str) -> list[float]:
        return [
            value
            for sample in self.samples
            for value, counted in zip(getattr(sample, field), sample.loss_mask, strict=True)
            if counted
        ]

    @property
    def is_weighed(self) -> bool:
        """Whether the tokens count differently in the loss."""
        return any(sample.weights for sample in self.samples)

    def parts(self, total: float) -> Parts:
        """What each token counts in a mean over tokens that together weigh `total`.

        A token's share of the total is a float32 number, however large or small the weights are.
        """
        if not self.is_weighed:
            return Parts(None, total)
        shares = torch.tensor(self._counted("weights"), dtype=torch.float64) / total
        return Parts(shares.float().to(self.tokens.device), 1.0)

    @property
    def weighed_tokens(self) -> int:
        return sum(sample.weighed_tokens for sample in self.samples)

    @property
    def sequences(self) -> Tensor:
        """[n] int64, which sample a token is of."""
        counts = torch.tensor([sample.loss_tokens for sample in self.samples])
        return torch.repeat_interleave(counts).to(self.tokens.device)

    @property
    def given(self) -> Tensor:
        """[n] which tokens are of completions that the data give."""
        return self._which(lambda sample: sample.given)

    def sampler_mismatch(self, logprobs: Tensor) -> Tensor:
        """[m] of log-probs [n]: how far they are from the sampler's, for the tokens that the student sampled.

        Only of those that count: the losses give no log-probs of the others.
        """
        sampled = [sample for sample in self.samples if sample.sampler_logprobs and not sample.given]
        known = {id(sample) for sample in sampled}
        sampler = dataclasses.replace(self, samples=sampled).per_token("sampler_logprobs")
        chosen = self._which(lambda sample: id(sample) in known)
        difference = logprobs[chosen] - sampler
        if not self.is_weighed:
            return difference
        counts = torch.tensor([weight != 0 for weight in self._counted("weights")], device=chosen.device)
        return difference[counts[chosen]]

    def _which(self, chosen: Callable[[Sample], bool]) -> Tensor:
        """[n] which tokens are of samples that are chosen."""
        values = [chosen(sample) for sample in self.samples for _ in range(sample.loss_tokens)]
        return torch.tensor(values, dtype=torch.bool, device=self.tokens.device)

    def top_k(self) -> TopK:
        """The teacher's likeliest tokens, [n, k]; ids of −1 pad."""
        found = [sample.teacher_top_k for sample in self.samples if sample.teacher_top_k is not None]
        return TopK(*(torch.cat(tensors).to(self.tokens.device) for tensors in zip(*found, strict=True)))

    def student_top_k(self) -> Tensor | None:
        """The ids [n, k] that the student chose, where it did."""
        found = [sample.student_top_k for sample in self.samples if sample.student_top_k is not None]
        return torch.cat(found).to(self.tokens.device) if found else None

    def scatter_top_k(self, found: TopK) -> None:
        """Gives each sample its rows of tensors [n, k]."""
        for sample, *part in zip(self.samples, *map(self._by_sample, found), strict=True):
            sample.teacher_top_k = TopK(*part)
        self.scattered.add("teacher_top_k")

    def scatter_student_top_k(self, ids: Tensor) -> None:
        """Gives each sample its rows of ids [n, k]."""
        for sample, part in zip(self.samples, self._by_sample(ids), strict=True):
            sample.student_top_k = part

    def _by_sample(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.cpu().split([sample.loss_tokens for sample in self.samples])

    def scatter(self, values: Tensor, field: str) -> None:
        """Writes a tensor [n] back into the samples' lists; 0 where a token does not count."""
        remaining, nothing = iter(values.tolist()), values.new_zeros(()).item()
        for sample in self.samples:
            setattr(sample, field, [next(remaining) if counted else nothing for counted in sample.loss_mask])
        self.scattered.add(field)


def batches(samples: Sequence[Sample], max_tokens: int, layout: Layout, device: torch.device) -> Iterator[Batch]:
    """Batches of at most `max_tokens` positions (padding counted); a longer sample gets one of its own."""
    for members in grouped(samples, max_tokens, layout):
        yield collate(members, layout, device)


def grouped(samples: Sequence[Sample], max_tokens: int, layout: Layout) -> list[list[Sample]]:
    """Which samples share a batch."""
    group = {"packed": _first_fit, "padded": _by_length, "single": _alone}[layout]
    return group(samples, max_tokens)


def in_order(samples: Sequence[Sample], max_tokens: int, layout: Layout, device: torch.device) -> list[Batch]:
    """As `batches`, but with the samples in their order: a batch ends where the next sample has no room in it."""
    groups: list[list[Sample]] = []
    for sample in samples:
        if groups and layout != "single" and positions([*groups[-1], sample], layout) <= max_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
    return [collate(members, layout, device) for members in groups]


def positions(samples: Sequence[Sample], layout: Layout) -> int:
    """How many positions a batch of these samples has, padding counted."""
    lengths = [len(sample.ids) for sample in samples]
    return sum(lengths) if layout == "packed" else len(lengths) * max(lengths)


def _first_fit(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Longest first, each into the first batch with room: at most 11/9 of the fewest batches, and one."""
    groups: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        length = len(sample.ids)
        place = next((index for index, left in enumerate(room) if length <= left), None)
        if place is None:
            place = len(groups)
            groups.append([])
            room.append(max_tokens)
        groups[place].append(sample)
        room[place] -= length
    return groups


def _by_length(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Rows of similar length, in whole runs of the sorted samples: the least padding."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        if not groups or (len(groups[-1]) + 1) * len(sample.ids) > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return groups


def _alone(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    return [[sample] for sample in sorted(samples, key=lambda s: len(s.ids))]


def collate(samples: list[Sample], layout: Layout, device: torch.device) -> Batch:
    """One batch of all the samples."""
    width = sum(len(s.ids) for s in samples) if layout == "packed" else max(len(s.ids) for s in samples)
    starts: list[int] = []
    ids: list[int] = []
    positions: list[int] = []
    for index, sample in enumerate(samples):
        starts.append(len(ids) if layout == "packed" else index * width)
        fill = 0 if layout == "packed" else width - len(sample.ids)
        ids += sample.ids + [PAD_ID] * fill
        positions += [*range(len(sample.ids)), *[0] * fill]
    inputs = {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions)}
    if layout != "packed":
        lengths = torch.tensor([len(s.ids) for s in samples])
        inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    inputs = {name: tensor.reshape(-1, width).to(device) for name, tensor in inputs.items()}
    # The hidden state of a place predicts the token of the next one.
    places = [
        (start + offset - 1, token)
        for start, sample in zip(starts, samples, strict=True)
        for offset, (token, counted) in enumerate(zip(sample.ids, sample.loss_mask, strict=True))
        if counted
    ]
    rows, tokens = torch.tensor(places, dtype=torch.long).reshape(-1, 2).to(device).unbind(1)
    return Batch(samples, inputs, rows, tokens)
