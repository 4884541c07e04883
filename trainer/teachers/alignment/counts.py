"""How much of completions was aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.segments import Segments


class Counts(NamedTuple):
    """What was aligned of samples, by the tokens that count."""

    tokens: int = 0
    aligned: int = 0  # of those, in a segment
    segments: int = 0
    bytes: int = 0  # in segments
    longest: int = 0  # bytes of a segment
    teacher_tokens: int = 0  # in segments

    @property
    def growth(self) -> float:
        """How many tokens the teacher has for one of the student's."""
        return self.teacher_tokens / self.aligned if self.aligned else 1.0

    def __str__(self) -> str:
        segments = max(1, self.segments)
        return (
            f"{self.aligned} of {self.tokens} tokens are in {self.segments} segments of {self.bytes / segments:.1f} bytes, "
            f"the longest of {self.longest}; the teacher has {self.teacher_tokens} tokens in them"
        )

    def metrics(self) -> dict[str, float]:
        """Nothing where no sample was aligned."""
        if not self.tokens:
            return {}
        segments = max(1, self.segments)
        return {
            "alignment/aligned_fraction": self.aligned / self.tokens,
            "alignment/segment_bytes": self.bytes / segments,
            "alignment/segment_bytes_max": self.longest,
            "alignment/segment_tokens": self.aligned / segments,
            "alignment/teacher_segment_tokens": self.teacher_tokens / segments,
        }


def sum_counts(parts: Sequence[Counts]) -> Counts:
    """Of all of them together."""
    if not parts:
        return Counts()
    added = Counts(*map(sum, zip(*parts, strict=True)))
    return added._replace(longest=max(part.longest for part in parts))


def counts_of(found: Segments, counted: Array) -> Counts:
    """Of one completion, whose tokens count where `counted` says so."""
    own = sizes(found.student_of[counted], found)
    judged = own > 0
    lengths = found.lengths[judged]
    return Counts(
        tokens=int(np.count_nonzero(counted)),
        aligned=int(own.sum()),
        segments=len(lengths),
        bytes=int(lengths.sum()),
        longest=int(lengths.max(initial=0)),
        teacher_tokens=int(sizes(found.teacher_of, found)[judged].sum()),
    )


def sizes(places: Array, found: Segments) -> Array:
    """How many tokens of some places there are in each segment."""
    return np.bincount(places[places >= 0], minlength=found.count)
