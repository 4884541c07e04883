"""Rows of scores that the tests of row functions share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def edge(width: int, *entries: tuple[int, float], fill: float = 0.0) -> Tensor:
    """A row of `fill` with some entries set."""
    row = torch.full((width,), fill)
    for column, value in entries:
        row[column] = value
    return row


def ramp(width: int, shift: float = 0.0) -> Tensor:
    return shift + torch.arange(width) % 64 / 8.0


def rows_far_apart(device: str, folder: Path) -> Tensor:
    """[3, 50] bf16; the third row starts 2³¹ + 32 elements after the first. On a CPU the 4 GB are a file, mostly hole."""
    stride, width = 2**30 + 16, 50
    numel = 2 * stride + width
    if device == "cpu":
        storage = torch.from_file(str(folder / "chunk"), shared=True, size=numel, dtype=torch.bfloat16)
    else:
        storage = torch.empty(numel, dtype=torch.bfloat16, device=device)
    return storage.as_strided((3, width), (stride, 1))
