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
        closing: bool [n], which tokens close the segment before theirs: the first of each, where tokenizers look ahead.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._numbers, self._firsts = None, None
        if not any(len(sample.segments) for sample in samples):
            self.known = torch.ones(sum(len(sample.ids) for sample in samples), dtype=torch.bool)
            self.closing = torch.zeros_like(self.known)
            return
        numbers = [sample.segments if len(sample.segments) else np.arange(len(sample.ids)) + 1 for sample in samples]
        self.known = torch.from_numpy(end_to_end(numbers, np.int64) > 0)
        self._firsts = torch.from_numpy(end_to_end([_firsts(own) for own in numbers], np.bool_))
        self._numbers = self._firsts.cumsum(0) - 1
        closing = [_closing(sample, own) for sample, own in zip(samples, numbers, strict=True)]
        self.closing = torch.from_numpy(end_to_end(closing, np.bool_))

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

    def to_closing(self, values: Tensor) -> Tensor:
        """[n]: to each token what the segment has that it closes, of values [m]; 0 where it closes none."""
        before = values if self._numbers is None else values[(self._numbers - 1).clamp(min=0)]
        return before.where(self.closing, 0.0)


def _firsts(numbers: Array) -> Array:
    """[T] bool: where a segment begins; a token of none is one by itself."""
    return np.concatenate([[True], (numbers[1:] != numbers[:-1]) | (numbers[1:] == 0)])


def _closing(sample: Sample, numbers: Array) -> Array:
    """[T] bool: where a segment begins at the end of another."""
    begins = (numbers[1:] != numbers[:-1]) & (numbers[1:] > 0) & (numbers[:-1] > 0)
    return np.concatenate([[False], begins & (sample.looks_ahead and len(sample.segments) > 0)])
