"""Segments tile two tokenizations of one text."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY

from fastkl.trainer.teachers.alignment.segments import (
    NOWHERE,
    Block,
    Segments,
    align,
)

LENGTHS = st.lists(st.integers(0, 4), max_size=30)


def of_one_text(ours: list[int], theirs: list[int]) -> tuple[list[int], list[int]]:
    """The shorter text gets a last token of what is missing."""
    missing = sum(ours) - sum(theirs)
    return [*ours, max(0, -missing)], [*theirs, max(0, missing)]


def of_whole(ours: npt.ArrayLike, theirs: npt.ArrayLike) -> Segments:
    return align(ours, theirs, [Block(0, 0, int(np.sum(ours)))])


def by_hand(ours: list[int], theirs: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Segment numbers of both, and lengths: one byte after another."""
    ends = [set(np.cumsum(lengths).tolist()) for lengths in (ours, theirs)]
    common = [end for end in range(1, sum(ours) + 1) if end in ends[0] and end in ends[1]]

    def places(lengths: list[int]) -> list[int]:
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        return [min(sum(end <= start for end in common), len(common) - 1) for start in starts]

    return places(ours), places(theirs), [end - start for start, end in zip([0, *common], common, strict=False)]


@PROPERTY
@given(LENGTHS, LENGTHS)
def test_segments_are_the_smallest_stretches_between_common_boundaries(ours: list[int], theirs: list[int]) -> None:
    ours, theirs = of_one_text(ours, theirs)
    found = of_whole(ours, theirs)
    student_of, teacher_of, lengths = by_hand(ours, theirs)
    assert found.student_of.tolist() == student_of
    assert found.teacher_of.tolist() == teacher_of
    assert found.lengths.tolist() == lengths
    for values, places in ((ours, found.student_of), (theirs, found.teacher_of)):
        assert not lengths or np.bincount(places, values).tolist() == lengths


@PROPERTY
@given(LENGTHS)
def test_of_one_tokenization_each_token_that_writes_is_a_segment(ours: list[int]) -> None:
    ours = [length for length in ours if length]
    found = of_whole(ours, ours)
    assert found.student_of.tolist() == found.teacher_of.tolist() == list(range(len(ours)))
    assert found.lengths.tolist() == ours


def test_an_emoji_between_other_tokens() -> None:
    found = of_whole([1, 2, 2, 3], [2, 3, 1, 2])
    assert found.student_of.tolist() == [0, 0, 0, 1]
    assert found.teacher_of.tolist() == [0, 0, 1, 1]
    assert found.lengths.tolist() == [5, 3]


def test_nothing_at_all() -> None:
    assert of_whole([], []).count == 0
    found = of_whole([0], [0, 0])
    assert found.student_of.tolist() == [NOWHERE]
    assert found.teacher_of.tolist() == [NOWHERE, NOWHERE]


def test_tokens_that_reach_out_of_what_is_equal_are_in_no_segment() -> None:
    # ab|c|é|d and a|bc|e\u0301d: "é" is two bytes here and three there.
    found = align([2, 1, 2, 1], [1, 2, 1, 2, 1], [Block(0, 0, 3), Block(5, 6, 1)])
    assert found.student_of.tolist() == [0, 0, NOWHERE, 1]
    assert found.teacher_of.tolist() == [0, 0, NOWHERE, NOWHERE, 1]
    assert found.lengths.tolist() == [3, 1]
    found = align([2, 1, 2, 1], [1, 2, 4], [Block(0, 0, 3), Block(5, 6, 1)])
    assert found.student_of.tolist() == [0, 0, NOWHERE, NOWHERE]
    assert found.teacher_of.tolist() == [0, 0, NOWHERE]


def test_what_one_text_lacks() -> None:
    found = align([1, 1], [1, 3, 1], [Block(0, 0, 1), Block(1, 4, 1)])
    assert found.student_of.tolist() == [0, 1]
    assert found.teacher_of.tolist() == [0, NOWHERE, 1]
    found = align([1, 1], [2, 3], [Block(0, 0, 0), Block(2, 5, 0)])
    assert found.count == 0
    assert set(found.student_of) == set(found.teacher_of) == {NOWHERE}


@PROPERTY
@given(LENGTHS, LENGTHS, st.integers(0, 2**32 - 1))
def test_dropped_segments_take_their_tokens_with_them(ours: list[int], theirs: list[int], seed: int) -> None:
    found = of_whole(*of_one_text(ours, theirs))
    dropped = np.random.default_rng(seed).random(found.count) < 0.4
    kept = found.without(dropped)
    assert kept.lengths.tolist() == found.lengths[~dropped].tolist()
    for before, after in ((found.student_of, kept.student_of), (found.teacher_of, kept.teacher_of)):
        gone = (before == NOWHERE) | np.append(dropped, True)[before]
        assert (after[gone] == NOWHERE).all()
        numbers = np.flatnonzero(~dropped)
        assert numbers[after[~gone]].tolist() == before[~gone].tolist()


def test_a_million_tokens_take_seconds_at_most() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = of_one_text(*(generator.integers(1, 9, 1_000_000).tolist() for _ in range(2)))
    lengths = np.array(ours), np.array(theirs)
    start = time.process_time()
    found = of_whole(*lengths)
    assert time.process_time() - start < 2.0
    assert found.lengths.sum() == lengths[0].sum()
