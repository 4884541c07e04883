"""Where two texts that are nearly one are equal, byte by byte."""

from __future__ import annotations

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.segments import Block

# After a difference, so many equal bytes are looked for so far away; then more of them, further and further.
_ANCHOR, _NEAR = 4, 16
_ANCHOR_FAR = 8


def equal_stretches(ours: bytes, theirs: bytes) -> list[Block]:
    """Stretches of the same bytes, in order; the first begins where both texts do, the last ends where both do.

    After a difference the texts are taken to be one again at the nearest equal bytes, 4 within 16 bytes of it or 8 further
    away, or at their ends. Takes time in proportion to the texts, whatever they hold.
    """
    if ours == theirs:
        return [Block(0, 0, len(ours))]
    a, b = _with_end(ours), _with_end(theirs)
    blocks: list[Block] = []
    i = j = 0
    while True:
        length = _equal(a[i:], b[j:])
        if i + length == len(a):
            return [*blocks, Block(i, j, len(ours) - i)]
        blocks.append(Block(i, j, length))
        i, j = i + length, j + length
        left, right = _next_anchor(a[i:], b[j:])
        i, j = i + left, j + right


def _with_end(text: bytes) -> Array:
    """The bytes, and an end that is in no text: only another end is equal to it."""
    return np.append(
        np.frombuffer(text, np.uint8).astype(np.uint16), np.arange(256, 256 + _ANCHOR_FAR, dtype=np.uint16)
    )


def _equal(a: Array, b: Array) -> int:
    """How many first values are equal."""
    most, start, step = min(len(a), len(b)), 0, 64
    while start < most:
        end = min(start + step, most)
        different = np.flatnonzero(a[start:end] != b[start:end])
        if len(different):
            return start + int(different[0])
        start, step = end, 2 * step
    return most


def _next_anchor(a: Array, b: Array) -> tuple[int, int]:
    """Where both go on with the same values, the fewest of both together skipped. Both have the same end."""
    near, size = _NEAR, _ANCHOR
    while True:
        places: dict[bytes, int] = {}
        for place, values in enumerate(_windows(a[: near + size], size)):
            places.setdefault(values, place)
        pairs = [
            (place + places[values], places[values], place)
            for place, values in enumerate(_windows(b[: near + size], size))
            if values in places
        ]
        if pairs and (min(pairs)[0] <= near or near >= max(len(a), len(b))):
            return min(pairs)[1:]
        near, size = 4 * near, _ANCHOR_FAR


def _windows(values: Array, size: int) -> list[bytes]:
    held, width = values.tobytes(), values.itemsize
    return [held[width * place : width * (place + size)] for place in range(len(values) - size + 1)]
