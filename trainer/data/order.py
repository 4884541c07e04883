"""Which rows a step gets: a pure function of seed and step, so that a resumed run needs no cursor."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def batch_indices(rows: int, per_step: int, step: int, seed: int) -> list[int]:
    """The rows of a step: consecutive places of an endless sequence of permutations.

    Every row comes once before any comes twice.
    """
    return rows_at(rows, range(step * per_step, (step + 1) * per_step), seed)


def rows_at(rows: int, places: range, seed: int) -> list[int]:
    """What stands in these places of an endless sequence of permutations of the rows."""
    permutations = {epoch: _permutation(rows, epoch, seed) for epoch in {place // rows for place in places}}
    return [int(permutations[place // rows][place % rows]) for place in places]


@lru_cache(maxsize=16)
def _permutation(rows: int, epoch: int, seed: int) -> Tensor:
    """[rows] int32: made once an epoch, not once a step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).to(torch.int32)
