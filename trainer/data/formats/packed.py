"""Sequences that hold less than their entries would: rows packed, and what is made of them on demand."""

from __future__ import annotations

import pickle
import zlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import accumulate
from typing import Generic, TypeVar, overload

T = TypeVar("T")
BLOCK = 1 << 14  # bytes before they are compressed


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
    """Rows of the data: those that have about `BLOCK` bytes together are compressed as one."""

    def __init__(self, rows: Iterable[T] = ()) -> None:
        self._blocks: list[bytes] = []
        self._starts = array("q", [0])  # the place of each block's first row, and of what comes next
        self._begin()
        self._unpacked = (-1, self._last)  # what was unpacked last, and its number: rows are read in order
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return self._starts[-1] + len(self._last)

    def append(self, row: T) -> None:
        self._last.append(row)
        self._pickler.dump(row)
        if self._stream.tell() >= BLOCK:
            self._blocks.append(zlib.compress(self._stream.getbuffer()))
            self._starts.append(len(self))
            self._begin()

    def _begin(self) -> None:
        self._last: list[T] = []  # too few to pack yet
        self._stream = BytesIO()
        # One for all rows of a block: what several of them share stands there once.
        self._pickler = pickle.Pickler(self._stream, pickle.HIGHEST_PROTOCOL)

    def at(self, place: int) -> T:
        number = bisect_right(self._starts, place) - 1
        start = self._starts[number]
        if number == len(self._blocks):
            return self._last[place - start]
        found, rows = self._unpacked
        if found != number:
            unpickler = pickle.Unpickler(BytesIO(zlib.decompress(self._blocks[number])))
            rows = [unpickler.load() for _ in range(start, self._starts[number + 1])]
            self._unpacked = number, rows
        return rows[place - start]
