"""Small things about the arrays of samples."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def total(values: Array) -> float:
    """The sum in float64, added one by one: the order of the sum, and so its last bits, depend on nothing else."""
    return float(values.cumsum(dtype=np.float64)[-1]) if len(values) else 0.0


def after_zeros(count: int, values: Array) -> Array:
    """The values after so many zeros, or Falses."""
    return np.concatenate([np.zeros(count, values.dtype), values])


def end_to_end(arrays: Sequence[Array], dtype: npt.DTypeLike) -> Array:
    """One array of all; an empty one of none."""
    return np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype)


def pieces(values: Array, lengths: Sequence[int]) -> Iterator[Array]:
    """Views of consecutive parts."""
    start = 0
    for length in lengths:
        yield values[start : start + length]
        start += length


class Ragged:
    """Lists of token ids, end to end in one array."""

    def __init__(self) -> None:
        self._ids, self._ends = array("i"), array("q")

    def append(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> array[int]:
        """The ids at a place from 0 on."""
        return self._ids[self._ends[place - 1] if place else 0 : self._ends[place]]

    @property
    def lengths(self) -> Array:
        """[n] int64."""
        return np.diff(np.array(self._ends), prepend=0)

    def longest(self) -> list[int]:
        """The first of the longest lists."""
        return self[int(self.lengths.argmax())].tolist()

    def highest(self) -> tuple[int, int]:
        """The highest id, and the place of the first list that has it."""
        found = int(np.frombuffer(self._ids, np.int32).argmax())
        return self._ids[found], bisect_right(self._ends, found)
