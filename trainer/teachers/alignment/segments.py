"""Two tokenizations of one text, cut into segments: the smallest stretches at whose two ends both have a boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastkl.trainer.data.arrays import Array

NOWHERE = -1  # the segment of a token that is in none


@dataclass(frozen=True, eq=False)
class Segments:
    """Which segment each token is in. Segments have numbers from 0 on, in the order of the text, with tokens of both."""

    student_of: Array  # int32 [n_student]; −1: no text of both
    teacher_of: Array  # int32 [n_teacher]
    lengths: Array  # int32 [count], bytes

    @property
    def count(self) -> int:
        return len(self.lengths)

    def without(self, dropped: Array) -> Segments:
        """Without the segments where `dropped`, bool [count], says so: their tokens are in none. The others move up."""
        if not dropped.any():
            return self
        new = np.where(dropped, NOWHERE, np.cumsum(~dropped) - 1).astype(np.int32)
        places = np.append(new, np.int32(NOWHERE))  # the last: of the tokens that were in none
        return Segments(places[self.student_of], places[self.teacher_of], self.lengths[~dropped])


class Block(NamedTuple):
    """A stretch with the same bytes in both texts."""

    student: int  # where it begins, bytes
    teacher: int
    length: int


def align(student_lengths: npt.ArrayLike, teacher_lengths: npt.ArrayLike, blocks: Sequence[Block]) -> Segments:
    """The segments of two token sequences, from the tokens' lengths in bytes, [n_student] and [n_teacher].

    `blocks` are the stretches in which their texts are equal, in order: the first begins where both texts do, the last ends
    where both do, and each may be empty. Of one text, one block is all of it, and the segments tile both sequences. A token
    that reaches out of a block is in no segment. One that writes nothing is in the segment that follows it, or in the last.
    Takes time in proportion to the tokens.
    """
    ours, theirs = _bounds(student_lengths), _bounds(teacher_lengths)
    found = [_common(ours, theirs, block) for block in blocks]
    pairs = np.concatenate(found)  # [count + 1, 2]: where segments begin and end, in both texts
    owner = np.repeat(np.arange(len(found)), [len(own) for own in found])
    sizes = np.diff(pairs[:, 0]).astype(np.int32)
    student_of, teacher_of = (
        _places(bounds[:-1], ends) for bounds, ends in zip((ours, theirs), pairs[1:].T, strict=True)
    )
    return Segments(student_of, teacher_of, sizes).without(np.diff(owner) != 0)


def _bounds(lengths: npt.ArrayLike) -> Array:
    """Where tokens begin, and where the last ends, int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])


def _common(ours: Array, theirs: Array, block: Block) -> Array:
    """The boundaries of both in a stretch, its ends included, [n, 2]."""
    shift = block.teacher - block.student
    near, others = _between(ours, block.student, block.length), _between(theirs, block.teacher, block.length) - shift
    if not len(others):
        return np.empty((0, 2), np.int64)
    near = near[np.diff(near, prepend=near[:1] - 1) != 0]  # tokens that write nothing end where others do
    common = near[others[np.searchsorted(others, near).clip(max=len(others) - 1)] == near]
    return np.stack([common, common + shift], axis=1)


def _between(bounds: Array, start: int, length: int) -> Array:
    return bounds[np.searchsorted(bounds, start) : np.searchsorted(bounds, start + length, side="right")]


def _places(starts: Array, ends: Array) -> Array:
    """Which of the stretches that end there each token is in, int32 [n]; one that begins after the last is in the last."""
    places = np.searchsorted(ends, starts, side="right")
    return np.minimum(places, len(ends) - 1).astype(np.int32)  # −1 where there are none
