"""Tokens and their segments: what a teacher with its own tokenizer can judge is a segment, and its tokens answer for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastkl.trainer.data.arrays import Array, end_to_end
from fastkl.trainer.data.samples import Sample


class Segments:
    """The segments of all tokens [n] of some samples end to end: [m] of them, in order.

    A token that is of none, and any of a sample without segments, is one by itself.

    Attributes:
        known: bool [n], which tokens a teacher can say something of, as far as segments tell.
        look_back: Whether some tokens answer for segments before their own (`Sample.answers_back`).
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._numbers, self._firsts, self._since, self.look_back = None, None, None, False
        if not any(len(sample.segments) for sample in samples):
            self.known = torch.ones(sum(len(sample.ids) for sample in samples), dtype=torch.bool)
            return
        numbers = [sample.segments if len(sample.segments) else np.arange(len(sample.ids)) + 1 for sample in samples]
        self.known = torch.from_numpy(end_to_end(numbers, np.int64) > 0)
        self._firsts = torch.from_numpy(end_to_end([_firsts(own) for own in numbers], np.bool_))
        self._numbers = self._firsts.cumsum(0) - 1
        self.look_back = any(len(sample.answers_back) for sample in samples)
        if self.look_back:
            back = [s.answers_back if len(s.answers_back) else np.zeros(len(s.ids), np.int32) for s in samples]
            places = torch.arange(len(self._numbers)) - torch.from_numpy(end_to_end(back, np.int64))
            self._since = self._numbers[places]

    def sums(self, values: Tensor) -> Tensor:
        """[m] of values [n], added in float64."""
        if self._numbers is None:
            return values
        total = torch.zeros(int(self._numbers[-1]) + 1, dtype=torch.float64)
        return total.index_add_(0, self._numbers, values.double()).to(values.dtype)

    def of_first(self, values: Tensor) -> Tensor:
        """[m] of what is the same for all tokens [n] of a segment."""
        return values if self._firsts is None else values[self._firsts]

    def to_tokens(self, values: Tensor) -> Tensor:
        """[n]: to each token what its segment has, of values [m]."""
        return values if self._numbers is None else values[self._numbers]

    def to_later(self, values: Tensor) -> Tensor:
        """[n]: to each token what the segments before its own have together that it answers for, of values [m]."""
        if self._numbers is None or self._since is None:
            return torch.zeros(len(self.known), dtype=values.dtype)
        before = torch.cat([values.new_zeros(1, dtype=torch.float64), values.double().cumsum(0)])
        found = before[self._numbers] - before[self._since]
        return found.to(values.dtype).where(self.known, 0.0)


def _firsts(numbers: Array) -> Array:
    """[T] bool: where a segment begins; a token of none is one by itself."""
    return np.concatenate([[True], (numbers[1:] != numbers[:-1]) | (numbers[1:] == 0)])
