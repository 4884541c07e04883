"""Small things about the arrays of samples."""

from __future__ import annotations

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
