"""Small things about the arrays of samples."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

SHIFTS = (0, 16, 24)  # which bits of an id stand in a plane: two bytes, then one each


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
    """Lists of token ids, end to end: two bytes an id, and a third or fourth one for all once an id needs it."""

    def __init__(self) -> None:
        self._planes = [array("H")]  # the lower bits of all ids, then the higher ones
        self._ends, self._highest = array("q"), (-1, 0)

    def append(self, ids: Sequence[int]) -> None:
        new, before = np.asarray(ids, np.int32), self._end(len(self) - 1)
        highest = int(new.max(initial=-1))
        while highest >= 1 << 8 * (len(self._planes) + 1):
            self._planes.append(array("B", bytes(before)))
        for shift, plane in zip(SHIFTS, self._planes, strict=False):
            plane.frombytes((new >> shift).astype(plane.typecode).tobytes())
        if highest > self._highest[0]:
            self._highest = highest, len(self)
        self._ends.append(before + len(new))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> array[int]:
        """The ids at a place from 0 on."""
        start, end = self._end(place - 1), self._end(place)
        ids = np.zeros(end - start, np.int32)
        for shift, plane in zip(SHIFTS, self._planes, strict=False):
            ids |= np.array(plane[start:end], np.int32) << shift
        return array("i", ids.tobytes())

    def _end(self, place: int) -> int:
        return self._ends[place] if place >= 0 else 0

    @property
    def lengths(self) -> Array:
        """[n] int64."""
        return np.diff(np.array(self._ends), prepend=0)

    def longest(self) -> list[int]:
        """The first of the longest lists."""
        return self[int(self.lengths.argmax())].tolist()

    def highest(self) -> tuple[int, int]:
        """The highest id, and the place of the first list that has it; −1 and 0 where there is no id."""
        return self._highest
