"""What guards measure of samples, against what is put into them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY

from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.runs.guards.measures import LOOP, measures, repeats, top_share


def sample(ids: list[int], teacher: list[float] | None = None, **fields: Any) -> Any:
    made = make_sample([1, 2], ids, 0, [-1.0] * len(ids), truncated=True)
    if teacher is not None:
        made.teacher_logprobs = [0.0, 0.0, *teacher]
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@PROPERTY
@given(
    st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(3, 9)
)
def test_a_cycle_repeats_wherever_it_begins(before: list[int], cycle: list[int], times: int) -> None:
    ids = before + cycle * times
    assert repeats(np.array(ids)) or len(cycle) * times < LOOP


@PROPERTY
@given(st.permutations(range(60)), st.integers(0, 1))
def test_text_without_a_cycle_does_not(ids: list[int], again: int) -> None:
    assert not repeats(np.array(ids + again * ids))  # twice is not three times


def test_only_what_is_cut_is_a_loop() -> None:
    loop, text = [5, 6] * 12, list(range(3, 27))
    ended = sample(loop)
    ended.truncated = False
    assert measures([sample(loop), sample(text), ended, sample(text)])["completions/looping_fraction"] == 0.25


def test_the_data_set_whose_teacher_says_least() -> None:
    well = sample([3, 4, 5], [-1.0, -2.0, -6.0], dataset="well")
    ill = sample([3, 4, 5], [-4.0, -4.0, -4.0], dataset="ill")
    found = measures([well, ill])
    assert (found["teacher_logprobs/mean"], found["teacher_logprobs/std"]) == (-4.0, 0.0)
    assert "teacher_logprobs/std" not in measures([sample([3, 4, 5])])


def test_one_percent_of_the_tokens() -> None:
    values = np.array([9.0, -9.0, *[0.01] * 198])
    assert top_share(values) == pytest.approx(18 / (18 + 1.98))
    assert top_share(np.ones(200)) == pytest.approx(0.01)
    assert top_share(np.zeros(5)) == 0.0


def test_advantages_count_by_their_weights_and_not_where_they_are_few() -> None:
    ids, ones = list(range(3, 103)), [1.0] * 100
    loud = [*[0.0] * 2, *ones]
    loud[2:4] = [500.0, 500.0]
    quiet = [0.0, 0.0, 0.0, 0.0, *[1.0] * 98]
    pair = [sample(ids, advantages=loud), sample(ids, advantages=[0.0, 0.0, *ones])]
    assert measures(pair)["advantages/top_share"] == pytest.approx(1000 / 1198)
    for each in pair:
        each.weights = quiet
    assert measures(pair)["advantages/top_share"] == pytest.approx(2 / 196)
    assert "advantages/top_share" not in measures(pair[:1])


def test_given_completions_and_those_of_sft_are_nobody_s_own() -> None:
    given_one = sample([5, 6] * 12, given=True)
    assert measures([given_one]) == measures([make_sample([1], [5, 6] * 12, 0)]) == {}
