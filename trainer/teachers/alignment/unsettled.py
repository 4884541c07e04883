"""How much of a text a tokenizer may still split in another way, once it is seen what follows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastkl.trainer.data.arrays import Array

MOST = 8  # bytes at the end of a text; what is before them is taken to be settled


class Unsettled:
    """Of a tokenizer whose tokens write these bytes.

    Between two bytes that no token has side by side, each text is split, whatever follows. What comes before the last such
    place is settled.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        self._joined = np.zeros((256, 256), np.bool_)
        tokens = list(tokens)
        written = np.frombuffer(b"".join(tokens), np.uint8)
        ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
        inside = np.ones(max(len(written) - 1, 0), np.bool_)
        inside[ends[ends < len(written)] - 1] = False
        self._joined[written[:-1][inside], written[1:][inside]] = True

    def begins(self, text: bytes) -> Array:
        """Where what is not settled begins in each of the text's beginnings, int64 [n + 1]: of 0 to n bytes."""
        written, ends = np.frombuffer(text, np.uint8), np.arange(len(text) + 1)
        splits = np.zeros(len(text) + 1, np.int64)
        splits[2:] = np.where(self._joined[written[:-1], written[1:]], 0, ends[1:-1])
        return np.maximum(np.maximum.accumulate(splits), ends - MOST)

    def back(self, text: bytes, lengths: Array) -> Array:
        """How many tokens before each of the text's tokens, of so many bytes, reach into what is not settled there, [n]."""
        ends = np.cumsum(lengths, dtype=np.int64)
        firsts = np.searchsorted(ends, self.begins(text)[ends - lengths], side="right")
        return np.maximum(np.arange(len(lengths)) - firsts, 0).astype(np.int32)
