"""Numbers of a step that come from all its tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkl.trainer.runs.sharing.mismatch import mismatch_metrics


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=60), st.integers(0, 60))
def test_mismatch_is_that_of_all_batches_together(numbers: list[float], cut: int) -> None:
    values = torch.tensor(numbers)
    found = mismatch_metrics([values[:cut], values[cut:]])
    sizes = values.double().abs()
    assert found["sampler_mismatch/mean_abs"] == pytest.approx(sizes.mean().item(), abs=1e-6)
    assert found["sampler_mismatch/p95_abs"] == pytest.approx(sizes.quantile(0.95).item(), abs=1e-6)


def test_no_step_has_too_many_tokens_for_its_mismatch() -> None:
    found = mismatch_metrics([torch.zeros(2**24), torch.ones(2**21)])
    assert found["sampler_mismatch/p95_abs"] == 1
