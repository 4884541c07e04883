"""Scores as bytes and back."""

from __future__ import annotations

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from property_settings import PROPERTY

from fastkl.loss import TopK
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.cache.entries import Damaged, pack, restore

FIELDS = ("teacher_logprobs", "teacher_ranks", "teacher_top_k")
SINGLE = st.floats(-50, 0, width=32)


@PROPERTY
@given(st.lists(st.booleans(), max_size=6), st.data())
def test_bit_for_bit(mask: list[bool], data: st.DataObject) -> None:
    def aligned(values: st.SearchStrategy[float], zero: float) -> list[float]:
        return [data.draw(values) if counted else zero for counted in mask]

    logprobs = aligned(SINGLE, 0.0)
    ranks = [int(rank) for rank in aligned(st.sampled_from([0, 1, 7, 2**31 - 1]), 0)]
    shape = (sum(mask), data.draw(st.integers(1, 3)))
    ids = torch.randint(-1, 2**20, shape, dtype=torch.int32)
    lists = data.draw(st.sampled_from([None, TopK(ids, torch.randn(shape))]))
    sample = Sample([5] * len(mask), mask, 0, teacher_logprobs=logprobs, teacher_ranks=ranks, teacher_top_k=lists)
    again = Sample([5] * len(mask), mask, 0)
    restore(again, pack(sample, FIELDS))
    assert again.teacher_logprobs.tolist() == logprobs
    assert again.teacher_ranks.tolist() == ranks
    assert (again.teacher_top_k is None) == (lists is None)
    for found, wanted in zip(again.teacher_top_k or (), lists or (), strict=True):
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype


def test_what_was_not_written_is_left_alone() -> None:
    scored = Sample([5, 6], [False, True], 0, teacher_logprobs=[0.0, -1.0])
    sample = Sample([5, 6], [False, True], 0, teacher_ranks=[0, 3])
    restore(sample, pack(scored, FIELDS))
    assert (sample.teacher_logprobs.tolist(), sample.teacher_ranks.tolist()) == ([0.0, -1.0], [0, 3])


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_what_does_not_fit_is_refused(cut: int) -> None:
    content = pack(Sample([5, 6], [False, True], 0, teacher_logprobs=[0.0, -1.0]), FIELDS)
    sample = Sample([5, 6, 7], [False, True, True], 0)
    before = copy.copy(sample)
    for bad in itertools.chain([content], [content[:cut]]):
        with pytest.raises(Damaged):
            restore(sample, bad)
    assert all(value is getattr(before, name) for name, value in vars(sample).items())
