"""The tutorial's code says what the page shows."""

from __future__ import annotations

import re

import pytest
from launches import REPOSITORY
from tutorial import outputs, played

PAGE = REPOSITORY / "docs/start/tutorial.md"
NUMBER = re.compile(r" *-?\d+(\.\d+)?")
SHARE = re.compile(r"(\d+)%")
POINTS = 8  # rounding changes a token, and then all that follows


@pytest.mark.slow
def test_the_tutorial_prints_what_the_page_shows() -> None:
    shown = PAGE.read_text(encoding="utf-8")
    for before, now in zip(outputs(shown), outputs(played(shown)), strict=True):
        assert NUMBER.sub("#", now) == NUMBER.sub("#", before)
        for wanted, found in zip(SHARE.findall(before)[-1:], SHARE.findall(now)[-1:], strict=True):
            assert abs(int(found) - int(wanted)) <= POINTS, now


def test_what_code_prints_stands_below_it() -> None:
    page = "a\n\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\nold\n```\n"
    assert played(page) == page.replace("old", "1")
    with pytest.raises(AssertionError):
        played("```python\nprint(1)\n```\n")
