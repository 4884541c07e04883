"""The plans of the GPU configs are those that `fastkl plan` makes of them now."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launches import REPOSITORY
from recipe_cases import Load

FOLDER = REPOSITORY / "recipes" / "reasoning" / "gpu"
REPORT: list[dict[str, Any]] = json.loads((FOLDER / "plans.json").read_text(encoding="utf-8"))


def test_the_report_is_of_these_plans(recipe: Load) -> None:
    (plan,) = recipe("reasoning/gpu", "plan")
    assert [each["words"] for each in REPORT] == [plan.words(*each) for each in plan.PLANS]
    assert {config for config, *_ in plan.PLANS} == {path.stem for path in FOLDER.glob("*.yaml")}
    assert [each["words"] for each in REPORT if each["peak"] > each["room"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(REPORT)))
def test_the_plans_are_still_those(place: int, recipe: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    (plan,) = recipe("reasoning/gpu", "plan")
    monkeypatch.chdir(REPOSITORY)
    assert plan.measure(REPORT[place]["words"]) == REPORT[place]
