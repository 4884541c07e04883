"""What FSDP gathers for the batches of a step."""

from __future__ import annotations

import pytest
import torch
from fused_training import gathered_bytes
from groups import in_group


@pytest.mark.parametrize("kind", ["full", pytest.param("lora-of-fused", marks=pytest.mark.slow)])
def test_the_head_is_gathered_once_for_all_batches(kind: str) -> None:
    """3 batches with a backward pass each and 2 without would gather what is in no layer 8 times; twice is enough."""
    for each_time, once in in_group(gathered_bytes, kind):
        saved = each_time.gathered - once.gathered
        assert saved == pytest.approx(6 * once.outer, rel=0.02)
        assert each_time.gradients.keys() == once.gradients.keys()
        for name, gradient in once.gradients.items():
            assert torch.equal(gradient, each_time.gradients[name]), name
