"""From samples to tensors: which samples share a forward pass, and how they are laid out in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkl.loss import TopK
from fastkl.trainer.data.arrays import Array, end_to_end, pieces
from fastkl.trainer.data.samples import ARRAYS, Sample

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

    def per_token(self, field: str) -> Tensor:
        """An array of the samples (`advantages`, `sampler_logprobs`, …) as a float32 tensor [n]."""
        return torch.from_numpy(_counted(self.samples, field)).float().to(self.tokens.device)

    @property
    def is_weighed(self) -> bool:
        """Whether the tokens count differently in the loss."""
        return any(len(sample.weights) for sample in self.samples)

    def parts(self, total: float) -> Parts:
        """What each token counts in a mean over tokens that together weigh `total`.

        A token's share of the total is a float32 number, however large or small the weights are.
        """
        if not self.is_weighed:
            return Parts(None, total)
        shares = torch.from_numpy(_counted(self.samples, "weights")) / total
        return Parts(shares.float().to(self.tokens.device), 1.0)

    @property
    def weighed_tokens(self) -> int:
        return sum(sample.weighed_tokens for sample in self.samples)

    @property
    def sequences(self) -> Tensor:
        """[n] int64, which sample a token is of."""
        return torch.repeat_interleave(torch.tensor(self._counts())).to(self.tokens.device)

    @property
    def given(self) -> Tensor:
        """[n] which tokens are of completions that the data give."""
        return self._which(lambda sample: sample.given)

    def beside_sampler(self, logprobs: Tensor) -> Tensor:
        """[m, 2] of log-probs [n]: they and the sampler's, for the tokens that the student sampled.

        Only of those that count: the losses give no log-probs of the others.
        """
        sampled = [sample for sample in self.samples if len(sample.sampler_logprobs) and not sample.given]
        known = {id(sample) for sample in sampled}
        sampler = torch.from_numpy(_counted(sampled, "sampler_logprobs")).to(logprobs.device)
        chosen = self._which(lambda sample: id(sample) in known)
        both = torch.stack([logprobs[chosen], sampler.to(logprobs.dtype)], -1)
        if not self.is_weighed:
            return both
        counts = torch.from_numpy(_counted(self.samples, "weights") != 0).to(chosen.device)
        return both[counts[chosen]]

    def _which(self, chosen: Callable[[Sample], bool]) -> Tensor:
        """[n] which tokens are of samples that are chosen."""
        found = np.array([chosen(sample) for sample in self.samples], np.bool_)
        return torch.from_numpy(found.repeat(self._counts())).to(self.tokens.device)

    def _counts(self) -> list[int]:
        return [sample.loss_tokens for sample in self.samples]

    def top_k(self) -> TopK:
        """The teacher's likeliest tokens, [n, k]; ids of −1 pad."""
        found = [sample.teacher_top_k for sample in self.samples if sample.teacher_top_k is not None]
        ids, logprobs = (torch.cat(tensors).to(self.tokens.device) for tensors in zip(*found, strict=True))
        return TopK(ids.long(), logprobs)

    def student_top_k(self) -> Tensor | None:
        """The ids [n, k] that the student chose, where it did."""
        found = [sample.student_top_k for sample in self.samples if sample.student_top_k is not None]
        return torch.cat(found).to(self.tokens.device).long() if found else None

    def scatter_top_k(self, found: TopK) -> None:
        """Gives each sample its rows of tensors [n, k]."""
        parts = map(self._by_sample, (found.ids.int(), found.logprobs))
        for sample, *part in zip(self.samples, *parts, strict=True):
            sample.teacher_top_k = TopK(*part)

    def scatter_student_top_k(self, ids: Tensor) -> None:
        """Gives each sample its rows of ids [n, k]."""
        for sample, part in zip(self.samples, self._by_sample(ids.int()), strict=True):
            sample.student_top_k = part

    def _by_sample(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.cpu().split(self._counts())

    def scatter(self, values: Tensor, field: str) -> None:
        """Writes a tensor [n] back into the samples' arrays; 0 where a token does not count."""
        mask = end_to_end([sample.loss_mask for sample in self.samples], np.bool_)
        found = np.zeros(len(mask), ARRAYS[field])
        found[mask] = values.detach().cpu().numpy()
        for sample, own in zip(self.samples, pieces(found, [len(s.ids) for s in self.samples]), strict=True):
            setattr(sample, field, own)


def _counted(samples: Sequence[Sample], field: str) -> Array:
    """[n] of an array of the samples, at their tokens that count."""
    arrays = [getattr(sample, field) for sample in samples]
    for sample, array in zip(samples, arrays, strict=True):
        if len(array) != len(sample.ids):
            raise ValueError(f"{field} of a sample has {len(array)} entries for {len(sample.ids)} tokens")
    return end_to_end(arrays, ARRAYS[field])[end_to_end([sample.loss_mask for sample in samples], np.bool_)]


def batches(samples: Sequence[Sample], max_tokens: int, layout: Layout, device: torch.device) -> Iterator[Batch]:
    """Batches of at most `max_tokens` positions (padding counted); a longer sample gets one of its own."""
    for members in grouped(samples, max_tokens, layout):
        yield collate(members, layout, device)


def grouped(samples: Sequence[Sample], max_tokens: int, layout: Layout) -> list[list[Sample]]:
    """Which samples share a batch."""
    group = {"packed": _fitted, "padded": _by_length, "single": _alone}[layout]
    return group(samples, max_tokens)


def in_order(samples: Sequence[Sample], max_tokens: int, layout: Layout, device: torch.device) -> list[Batch]:
    """As `batches`, but with the samples in their order: a batch ends where the next sample has no room in it."""
    groups: list[list[Sample]] = []
    tokens = longest = 0  # of the last group
    for sample in samples:
        tokens, longest = tokens + len(sample.ids), max(longest, len(sample.ids))
        positions = tokens if layout == "packed" else longest * (len(groups[-1]) + 1 if groups else 1)
        if groups and layout != "single" and positions <= max_tokens:
            groups[-1].append(sample)
        else:
            groups.append([sample])
            tokens = longest = len(sample.ids)
    return [collate(members, layout, device) for members in groups]


def _fitted(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Longest first, each into the first batch with room: at most 11/9 of the fewest batches, and one."""
    ordered = sorted(samples, key=lambda s: -len(s.ids))
    groups: list[list[Sample]] = []
    for sample, place in zip(ordered, first_fit([len(s.ids) for s in ordered], max_tokens), strict=True):
        if place == len(groups):
            groups.append([])
        groups[place].append(sample)
    return groups


def first_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """The place of each thing, in their order: the first that has room for it. One that is too large has one of its own.

    A binary tree of places, whose nodes know the largest room below them: O(n log n).
    """
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    unlimited = max([capacity, *sizes])  # whatever comes has room in an empty place
    room = [unlimited] * (2 * leaves)
    found = []
    for size in sizes:
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < size)
        found.append(node - leaves)
        room[node] = min(room[node], capacity) - size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return found


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
    lengths = np.array([len(sample.ids) for sample in samples])
    ids = end_to_end([sample.ids for sample in samples], np.int64)
    mask = end_to_end([sample.loss_mask for sample in samples], np.bool_)
    positions = np.arange(len(ids)) - (lengths.cumsum() - lengths).repeat(lengths)
    inputs: dict[str, Array]
    places: Array  # of the samples' tokens in the batch
    if layout == "packed":
        inputs, places = {"input_ids": ids, "position_ids": positions}, np.arange(len(ids))
    else:
        real = np.arange(lengths.max()) < lengths[:, None]
        padded = {"input_ids": np.full(real.shape, PAD_ID), "position_ids": np.zeros(real.shape, np.int64)}
        padded["input_ids"][real], padded["position_ids"][real] = ids, positions
        inputs, places = {**padded, "attention_mask": real.astype(np.int64)}, np.flatnonzero(real)
    width = len(ids) if layout == "packed" else int(lengths.max())
    tensors = {name: torch.from_numpy(array).reshape(-1, width).to(device) for name, array in inputs.items()}
    # The hidden state of a place predicts the token of the next one.
    rows, tokens = torch.from_numpy(places[mask] - 1), torch.from_numpy(ids[mask])
    return Batch(samples, tensors, rows.to(device), tokens.to(device))
