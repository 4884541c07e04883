"""Sequences that hold less than their entries would: rows packed, and what is made of them on demand."""

from __future__ import annotations

import pickle
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar, overload

T = TypeVar("T")
TOGETHER = 32  # rows that are packed as one


class OnDemand(Sequence[T], ABC, Generic[T]):
    """A sequence whose entries are made when they are asked for, each time anew."""

    @abstractmethod
    def at(self, place: int) -> T:
        """The entry at a place from 0 on."""

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(len(self))[place]
        return self.at(places) if isinstance(places, int) else [self.at(each) for each in places]


class EndToEnd(OnDemand[T]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, place: int) -> T:
        part = bisect_right(self._starts, place) - 1
        return self._parts[part][place - self._starts[part]]


class Packed(OnDemand[T]):
    """Rows of the data: some together are one pickle, compressed."""

    def __init__(self, rows: Iterable[T] = ()) -> None:
        self._packed: list[bytes] = []
        self._last: list[T] = []  # too few to pack yet
        self._open = (-1, self._last)  # what was unpacked last, and its number: rows are read in order
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self._packed) * TOGETHER + len(self._last)

    def append(self, row: T) -> None:
        self._last.append(row)
        if len(self._last) == TOGETHER:
            self._packed.append(zlib.compress(pickle.dumps(self._last, pickle.HIGHEST_PROTOCOL), 1))
            self._last = []

    def at(self, place: int) -> T:
        number, inside = divmod(place, TOGETHER)
        if number == len(self._packed):
            return self._last[inside]
        found, rows = self._open
        if found != number:
            rows = pickle.loads(zlib.decompress(self._packed[number]))
            self._open = number, rows
        return rows[inside]
