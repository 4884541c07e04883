"""Lists of tokens that are joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY

from fastkl.loss import TopK
from fastkl.trainer.errors import RunError
from fastkl.trainer.teachers.lists import joined

LISTS = st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True)


@PROPERTY
@given(rows=st.lists(st.tuples(LISTS, LISTS), max_size=4), impossible=st.integers(0, 9))
def test_joined_lists_have_each_id_once_in_order(rows: list[tuple[list[int], list[int]]], impossible: int) -> None:
    """Padded lists of any lengths; an id that the teacher holds impossible is in none."""

    def padded(which: int) -> TopK:
        ids = torch.tensor([row[which] + [-1] * (5 - len(row[which])) for row in rows]).reshape(len(rows), 5).long()
        logprobs = (-1.0 - ids).masked_fill(ids == impossible, -torch.inf).where(ids >= 0, 0.0)
        return TopK(ids, logprobs)

    wanted = [[*dict.fromkeys(token for token in first + second if token != impossible)] for first, second in rows]
    if not all(wanted):
        with pytest.raises(
            RunError, match=r"none of the 10 tokens of a list any probability. Set loss.top_k_of to both"
        ):
            joined([padded(0), padded(1)])
        return
    found = joined([padded(0), padded(1)])
    assert found.ids.tolist() == [row + [-1] * (10 - len(row)) for row in wanted]
    assert torch.equal(found.logprobs, (-1.0 - found.ids).where(found.ids >= 0, 0.0))
