"""The fingerprint of a model's weights looks into tensors of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastkl.trainer.runs.identity import ENTRIES, weights_fingerprint


def module(tensor: torch.Tensor) -> nn.Module:
    holder = nn.Module()
    holder.register_buffer("weight", tensor)
    return holder


@pytest.mark.parametrize("size", [0, 1, 2, ENTRIES, 1000, 24_576_000])  # float32 has no 24,575,999
def test_the_ends_of_a_tensor_count(size: int) -> None:
    whole = torch.zeros(size, dtype=torch.bfloat16)
    before = weights_fingerprint(module(whole))
    assert weights_fingerprint(module(whole.clone())) == before
    for place in (0, -1) if size else ():
        other = whole.clone()
        other[place] = 1
        assert weights_fingerprint(module(other)) != before
