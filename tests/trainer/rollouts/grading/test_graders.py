"""Graders: what counts as the answer, on completions as models write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkl.trainer.rollouts.grading.graders import GRADERS, boxed, last_number


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("7", "7", 1),
        ("The sum is 12.", "12", 1),
        ("3 + 4 = 7", "7", 1),
        ("7, no: 8", "7", 0),
        ("1,234 apples", "1234", 1),
        ("1234", "1,234", 1),
        ("12, 13, and 14", "14", 1),
        ("-5", "-5", 1),
        ("-5", "5", 0),
        ("3.50", "3.5", 1),
        ("3.51", "3.5", 0),
        ("07", "7", 1),
        ("costs $18", "#### 18", 1),
        ("x = 9 <eos>", "so 3 + 6 = 9", 1),
        ("9007199254740993", "9007199254740992", 0),  # equal as floats
        ("1" + "0" * 400, "2" + "0" * 400, 0),  # both infinite as floats
        ("", "7", 0),
        ("seven", "7", 0),
        ("7", "seven", 0),
        ("", "", 0),
    ],
)
def test_last_number(completion: str, answer: str, score: float) -> None:
    assert last_number(completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"\boxed{7}", "7", 1),
        (r"so \boxed{1,234}.", "1234", 1),
        (r"\boxed{ 3.50 }", "3.5", 1),
        (r"\boxed{5} or \boxed{6}", "6", 1),
        (r"\boxed{5} or \boxed{6}", "5", 0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0),
        (r"\boxed{x + 1}", "x+1", 1),
        (r"\boxed{7}", r"so \boxed{7}", 1),
        (r"\boxed{9007199254740993}", "9007199254740992", 0),
        (r"\boxed{7", "7", 0),  # cut off
        (r"\boxed{7} then \boxed{", "7", 0),
        ("7", "7", 0),
        ("", "7", 0),
        (r"\boxed{}", "7", 0),
    ],
)
def test_boxed(completion: str, answer: str, score: float) -> None:
    assert boxed(completion, answer) == score


@pytest.mark.parametrize("name", sorted(GRADERS))
@given(completion=st.text(), answer=st.text())
def test_any_text_has_a_score(name: str, completion: str, answer: str) -> None:
    assert GRADERS[name](completion, answer) in (0.0, 1.0)


@given(value=st.integers(-(10**30), 10**30), step=st.integers(-2, 2))
def test_integers_are_compared_exactly(value: int, step: int) -> None:
    other = value + step
    assert last_number(f"it is {value:,}", str(other)) == float(value == other)
    assert boxed(rf"\boxed{{{value}}}", str(other)) == float(value == other)


def test_numbers_are_read_as_people_write_them() -> None:
    assert last_number("about .5", "0.5") == 1.0
    assert last_number("it is 1,234", "1234") == 1.0
    assert last_number("the pair 1,2", "2") == 1.0
    assert last_number("the pair 1,2", "12") == 0.0
