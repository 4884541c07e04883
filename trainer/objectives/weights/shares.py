"""The largest of a step's numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest(values: Tensor, share: float) -> Tensor:
    """bool [n]: the ⌈share · n⌉ largest of the values [n]; of equal ones the first."""
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[: math.ceil(share * len(values))]] = True
    return chosen
