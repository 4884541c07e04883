"""A step's rows are a pure function of its number."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastkl.trainer.data.order import batch_indices

sizes = st.integers(1, 40)


@given(rows=sizes, per_step=sizes, epochs=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_each_row_comes_once_per_epoch(rows: int, per_step: int, epochs: int, seed: int) -> None:
    steps = -(-rows * epochs // per_step)
    order = [index for step in range(steps) for index in batch_indices(rows, per_step, step, seed)]
    for epoch in range(epochs):
        assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    counts = Counter(order).values()
    assert max(counts) - min(counts) <= 1


@given(rows=sizes, per_step=sizes, step=st.integers(0, 10_000), seed=st.integers(0, 2**31))
def test_rows_of_a_step_depend_on_nothing_else(rows: int, per_step: int, step: int, seed: int) -> None:
    first = batch_indices(rows, per_step, step, seed)
    torch.manual_seed(step)
    before = torch.get_rng_state()
    assert batch_indices(rows, per_step, step, seed) == first
    assert torch.equal(torch.get_rng_state(), before)
    # How the places are cut into steps does not matter: the sequence is one.
    assert [batch_indices(rows, 1, step * per_step + i, seed)[0] for i in range(per_step)] == first


def test_order_differs_by_seed_and_by_epoch() -> None:
    orders = [batch_indices(50, 50, step, seed) for seed in (0, 1, 2) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 6
