"""Numbers of all processes in ascending order: found by counting digits, so that none of them travels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.runs.sharing.records import sum_arrays

BITS, DIGIT = 32, 8
SIGN = np.uint32(1 << 31)


def ranked(mine: Array, ranks: Sequence[int]) -> Array:
    """[len(ranks)] float32: of all processes' float32 numbers those with these ranks; 0 is the smallest's.

    All processes call it, with the same ranks, each below the number of numbers.
    """
    bits = np.ascontiguousarray(mine, np.float32).view(np.uint32)
    keys = np.where(bits & SIGN, ~bits, bits | SIGN)  # in the order of the numbers
    left, below, found = [keys] * len(ranks), list(ranks), np.zeros(len(ranks), np.uint32)
    for shift in range(BITS - DIGIT, -1, -DIGIT):
        digits = [(own >> np.uint32(shift)).astype(np.uint8) for own in left]
        counts = sum_arrays(np.array([np.bincount(own, minlength=1 << DIGIT) for own in digits]))
        for index, (own, up_to) in enumerate(zip(digits, counts.cumsum(1), strict=True)):
            digit = int(np.searchsorted(up_to, below[index], side="right"))
            below[index] -= int(up_to[digit] - counts[index, digit])
            found[index] = found[index] << np.uint32(DIGIT) | np.uint32(digit)
            left[index] = left[index][own == digit]  # those that begin with the digits so far
    return np.where(found & SIGN, found ^ SIGN, ~found).view(np.float32)


def quantile(mine: Array, q: float) -> float:
    """The q-quantile of all processes' float32 numbers, of which there is one at least, as `torch.quantile` has it.

    All processes call it.
    """
    position = q * (int(sum_arrays(np.array([len(mine)]))[0]) - 1)
    whole = int(position)
    below, above = ranked(mine, [whole, whole + (position > whole)]).astype(np.float64)
    return float(below + (position - whole) * (above - below))
