"""Means, standard errors and pass@k of graded answers, against their definitions."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY

from fastkl.trainer.rollouts.grading.statistics import best_of, mean, powers_below, standard_error

SCORES = st.lists(st.sampled_from([0.0, 0.25, 1.0, -2.0]), min_size=1, max_size=7)


@PROPERTY
@given(SCORES, st.data())
def test_the_best_of_k_is_the_mean_over_all_draws(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    assert best_of(scores, k) == pytest.approx(mean([max(draw) for draw in itertools.combinations(scores, k)]))


@PROPERTY
@given(st.integers(1, 200), st.data())
def test_of_right_and_wrong_it_is_pass_at_k(count: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, count)), data.draw(st.integers(1, count))
    scores = data.draw(st.permutations([1.0] * right + [0.0] * (count - right)))
    assert best_of(scores, k) == pytest.approx(1 - Fraction(math.comb(count - right, k), math.comb(count, k)))


def test_its_expectation_is_that_of_k_answers() -> None:
    """Over all outcomes of four answers, of which each is right with probability 0.3."""
    outcomes = itertools.product([0.0, 1.0], repeat=4)
    for k in (1, 2, 3, 4):
        expected = sum(0.3 ** sum(one) * 0.7 ** (4 - sum(one)) * best_of(one, k) for one in outcomes)
        assert expected == pytest.approx(1 - 0.7**k)
        outcomes = itertools.product([0.0, 1.0], repeat=4)


@PROPERTY
@given(SCORES, st.integers(1, 4))
def test_answers_that_are_all_alike_say_no_more_than_one(scores: list[float], times: int) -> None:
    """Of independent values it is their usual standard error, and copies of a problem's answers change nothing."""
    error = standard_error(scores, range(len(scores)))
    if len(scores) == 1:
        assert error is None
        return
    assert error == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)))
    copies = [score for score in scores for _ in range(times)]
    assert standard_error(copies, [place // times for place in range(len(copies))]) == pytest.approx(error)


def test_problems_with_unequal_numbers_of_answers() -> None:
    values, problems = [1.0, 0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "b", "c"]
    wanted = math.sqrt(3 / 2 * ((1 - 1.2) ** 2 + (2 - 1.2) ** 2 + (0 - 0.6) ** 2)) / 5
    assert standard_error(values, problems) == pytest.approx(wanted)


def test_powers() -> None:
    assert [powers_below(count) for count in (1, 2, 3, 8, 10)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 10]]
