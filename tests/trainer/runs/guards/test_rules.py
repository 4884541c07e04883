"""Each rule finds its pathology in the metrics of a run, and nothing in those of a healthy one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from guard_cases import STEPS, rows
from run_settings import MINIMAL, Settings, config

from fastkl.trainer.config.guards import GuardsConfig
from fastkl.trainer.runs.guards.rules import RULES, Facts, facts_of
from fastkl.trainer.runs.guards.watch import Watch

FACTS = Facts(frozenset({100, 20_000}))
FELL = [None, 0.7, None, 0.61, None, 0.6, None, 0.6, None, 0.6, None, 0.6]


def found(changes: dict[str, Any], facts: Facts = FACTS, **settings: Any) -> dict[str, int]:
    """The rules that find something, each with the first step in which it does."""
    watch, said = Watch(GuardsConfig(**settings), facts, []), {}
    for row in rows(**changes):
        step = int(row.pop("step"))
        said |= {finding.rule: step for finding in watch.look(step, row).findings if finding.is_new}
    return said


PATHOLOGIES: dict[str, tuple[dict[str, Any], str, int]] = {
    "one-log-prob": ({"teacher_logprobs__std": 1e-5}, "teacher_constant", 1),
    "certain-of-all": ({"teacher_logprobs__std": 0.0, "teacher_logprobs__mean": 0.0}, "teacher_constant", 1),
    "uniform": ({"teacher_logprobs__std": 0.1, "teacher_logprobs__mean": -4.6}, "teacher_constant", 1),
    "uniform-over-its-own": ({"teacher_logprobs__std": 0.1, "teacher_logprobs__mean": -9.9}, "teacher_constant", 1),
    "weights-read-wrongly": ({"teacher_logprobs__std": 75.0, "teacher_logprobs__mean": -115.0}, "teacher_constant", 1),
    "breaks-later": ({"teacher_logprobs__std": [2.0, 0.0]}, "teacher_constant", 7),
    "memorised": ({"teacher_kl": 0.085, "entropy": 0.03}, "nothing_to_learn", 1),
    "one-model": ({"teacher_kl": 0.0}, "nothing_to_learn", 1),
    "one-model-in-bfloat16": ({"teacher_kl": 3.2e-4, "entropy": 0.14}, "nothing_to_learn", 1),
    "collapse": ({"entropy": [0.5, 0.01], "teacher_kl": [0.6, 0.7]}, "entropy_collapse", 9),
    "collapse-of-rewards": (
        {"entropy": [0.5, 0.01], "teacher_kl": None, "reward__mean": [0.3, 0.2]},
        "entropy_collapse",
        9,
    ),
    "cut": (
        {"completions__truncated_fraction": [0, 0.3, 0.9], "completions__mean_length": [13, 14, 17]},
        "length_growth",
        9,
    ),
    "loops": ({"completions__looping_fraction": [0.0, 0.5]}, "repetition", 8),
    "loops-from-the-start": ({"completions__looping_fraction": 0.5}, "repetition", 1),
    "sampler": ({"sampler_mismatch__kl": 0.01}, "mismatch", 1),
    "a-top-p": ({"sampler_mismatch__missing": 0.012, "sampler_mismatch__missing_se": 2e-4}, "mismatch", 1),
    "a-temperature": ({"sampler_mismatch__slope": -0.035, "sampler_mismatch__slope_se": 0.001}, "mismatch", 1),
    "a-lower-temperature": ({"sampler_mismatch__slope": 0.07, "sampler_mismatch__slope_se": 0.004}, "mismatch", 1),
    "sure-with-three-steps": ({"sampler_mismatch__slope": 0.07, "sampler_mismatch__slope_se": 0.015}, "mismatch", 2),
    "outliers": ({"advantages__top_share": 0.95}, "few_tokens", 1),
    "other-tokens": ({"policy__teacher_rest_mass": 0.88, "policy__rest_mass": 0.0}, "rest", 1),
    "other-tokens-of-the-student": ({"policy__teacher_rest_mass": 0.0, "policy__rest_mass": 0.8}, "rest", 1),
    "more-and-more-other-tokens": ({"policy__teacher_rest_mass": [0.2, 0.6]}, "rest", 7),
    "overfitted": ({"eval__accuracy": FELL, "eval__accuracy_se": 0.024}, "accuracy_falling", 8),
}


@pytest.mark.parametrize(("changes", "rule", "step"), PATHOLOGIES.values(), ids=PATHOLOGIES)
def test_a_pathology_is_found_once(changes: dict[str, Any], rule: str, step: int) -> None:
    assert found(changes) == {rule: step}
    assert found(changes, **{rule: "off"}) == {}


HEALTHY: dict[str, dict[str, Any]] = {
    "as-it-is": {},
    "converges": {
        "teacher_kl": [0.6, 0.2, 0.01],
        "entropy": [0.5, 0.2, 0.01],
        "advantages__top_share": [0.2, 0.5, 0.95],
    },
    "rewards-are-earned": {"entropy": [0.5, 0.01], "teacher_kl": None, "reward__mean": [0.2, 0.9]},
    "another-language": {"teacher_logprobs__std": 6.0, "teacher_logprobs__mean": -12.0, "teacher_kl": 11.0},
    "sure-and-yet-far": {"teacher_kl": 0.45, "entropy": 0.015},
    "the-surest-that-learned": {"teacher_kl": 0.45, "entropy": 0.05},
    "near-and-yet-undecided": {"teacher_kl": 0.015, "entropy": 0.3},
    "both-certain": {"teacher_logprobs__std": 0.0, "teacher_logprobs__mean": 0.0, "entropy": 0.0, "teacher_kl": 0.3},
    "longer": {"completions__mean_length": [13, 16], "completions__truncated_fraction": [0, 0.2]},
    "a-short-limit": {"completions__truncated_fraction": [0.42, 0.96], "completions__mean_length": [23, 31]},
    "always-cut": {"completions__truncated_fraction": [0.8, 1.0], "completions__mean_length": [13, 16]},
    "loops-that-it-unlearns": {"completions__looping_fraction": [0.15, 0.1]},
    "older-samples": {"sampler_mismatch__kl": 0.3, "staleness__max": 2},
    "float8": {"sampler_mismatch__slope": -0.022, "sampler_mismatch__slope_se": 0.001},
    "few-tokens-to-say-so": {"sampler_mismatch__slope": -0.1, "sampler_mismatch__slope_se": 0.05},
    "a-mean-of-few-tokens": {"sampler_mismatch__missing": 0.02, "sampler_mismatch__missing_se": 0.01},
    "more-than-the-sampler": {"sampler_mismatch__missing": -0.05, "sampler_mismatch__missing_se": 1e-4},
    "older-samples-of-a-flatter-student": {"sampler_mismatch__slope": -0.2, "staleness__max": 1},
    "swings": {"eval__accuracy": [0.7, 0.66, 0.68, 0.65, 0.68, 0.67], "eval__accuracy_se": 0.024},
    "a-bad-evaluation": {"eval__accuracy": [None, 0.7, None, 0.5, None, 0.7, None, 0.5, None, 0.7, None, 0.6]},
    "nearly-one-tokenizer": {"policy__teacher_rest_mass": 0.05, "policy__rest_mass": 0.1},
    "sft": dict.fromkeys(("teacher_kl", "entropy")),
}


@pytest.mark.parametrize("changes", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_raises_none(changes: dict[str, Any]) -> None:
    assert found(changes) == {}


def test_a_mixture_of_experts_may_differ_more_and_dropout_as_it_likes() -> None:
    change = {"sampler_mismatch__kl": 0.01}
    assert found(change, FACTS._replace(has_experts=True)) == {}
    assert found(change, FACTS._replace(has_dropout=True)) == {}
    assert found(change, FACTS._replace(has_experts=True), max_mismatch=0.001) == {"mismatch": 1}
    tilted = {"sampler_mismatch__slope": -0.05, "sampler_mismatch__slope_se": 0.001}
    assert found(tilted, FACTS._replace(has_experts=True)) == found(tilted, FACTS._replace(rounds=True)) == {}
    assert found(tilted, FACTS._replace(has_experts=True), max_slope=0.04) == {"mismatch": 1}


@pytest.mark.parametrize(
    ("given", "rounds"),
    [
        ({"sampling.dtype": "bfloat16"}, True),
        ({"mixed_precision": "bf16"}, True),
        ({"sampling.dtype": "bfloat16", "mixed_precision": "bf16"}, True),
        ({"student.dtype": "bfloat16", "mixed_precision": "bf16"}, False),
        ({"sampling.dtype": "float16"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_rounding_to_bfloat16_is_no_wrong_sampler(given: Settings, rounds: bool) -> None:
    facts = facts_of(config("distill", MINIMAL["distill"] | given), [100], has_experts=False)
    assert found({"sampler_mismatch__kl": 0.016}, facts) == ({} if rounds else {"mismatch": 1})
    assert found({"sampler_mismatch__kl": 0.016}, facts, max_mismatch=0.002) == {"mismatch": 1}
    assert found({"sampler_mismatch__kl": 0.09}, facts) == {"mismatch": 1}


@pytest.mark.parametrize(
    ("objective", "kl", "finds"),
    [
        ("policy_gradient", 0.092, True),
        ("policy_gradient", 0.11, False),
        ("reverse_kl", 0.017, True),
        ("reverse_kl", 0.085, False),
        ("top_k", 0.085, False),
    ],
)
def test_distributions_teach_a_surer_student(objective: str, kl: float, finds: bool) -> None:
    facts = facts_of(config("distill", MINIMAL["distill"] | {"loss.objective": objective}), [100], has_experts=False)
    begun = {"teacher_kl": kl, "entropy": 0.037}
    assert found(begun, facts) == ({"nothing_to_learn": 1} if finds else {})
    assert found(begun, facts, min_teacher_kl=0.2) == {"nothing_to_learn": 1}
    assert found(begun, facts, min_teacher_kl=0) == {}


GRADED = {"reward.grader": "last_number", "reward.baseline": "none"}
READ = {"reward.grader": "last_number", "reward.coef": 0}
READS = {"teacher.context.function": "module.read"}
LESSONS: dict[str, tuple[Settings, bool]] = {
    "a-teacher-alone": ({}, False),
    "rewards": (GRADED, True),
    "grades-that-a-context-reads": (READ | READS, False),
    "a-reference": ({"loss.extrapolate": 1.5, "reference.path": "other"}, True),
    "given-completions": ({"sampling.on_policy_fraction": 0.5}, True),
    "given-completions-that-the-teacher-judges": (
        {"sampling.on_policy_fraction": 0.5, "loss.objective": "reverse_kl"},
        False,
    ),
}


@pytest.mark.parametrize(("lesson", "teaches"), LESSONS.values(), ids=LESSONS)
def test_something_else_teaches_a_student_that_is_its_teacher(lesson: Settings, teaches: bool) -> None:
    settings = config("distill", MINIMAL["distill"] | lesson)
    graded = {"reward__mean": 0.3} if settings.reward.grader else {}
    said = found({"teacher_kl": 0.0, **graded}, facts_of(settings, [100], has_experts=False))
    assert said == ({} if teaches else {"nothing_to_learn": 1})


def test_scores_without_an_error_have_no_margin() -> None:
    values = [None, 12.0, None, 11.0, None, 10.5, None, 10.9, None, None, None, None]
    assert found({"eval__accuracy": values}) == {"accuracy_falling": 8}


def test_the_demo_raises_none() -> None:
    """Its metrics as they were recorded, in the order of its steps."""
    recorded = json.loads((Path(__file__).parent / "demo.json").read_text())
    watch = Watch(GuardsConfig(), FACTS, [])
    for step, values in enumerate(zip(*recorded.values(), strict=True), 1):
        row = {name: value for name, value in zip(recorded, values, strict=True) if value is not None}
        assert watch.look(step, row).findings == []


def test_a_watch_that_is_begun_again_says_nothing_twice() -> None:
    history = rows(completions__looping_fraction=[0.0, 0.5])
    whole, parts = Watch(GuardsConfig(), FACTS, []), []
    for row in history:
        parts.append((whole.look(row["step"], {k: v for k, v in row.items() if k != "step"}), row))
    logged = [row | looked.metrics for looked, row in parts]
    for cut in range(1, STEPS):
        again = Watch(GuardsConfig(), FACTS, logged[:cut])
        for row, (looked, _) in zip(history[cut:], parts[cut:], strict=True):
            assert again.look(row["step"], {k: v for k, v in row.items() if k != "step"}) == looked


def test_every_rule_has_a_setting_and_every_setting_a_rule() -> None:
    actions = {field.name for field in dataclasses.fields(GuardsConfig) if field.type == "Action"}
    assert actions == {rule.name for rule in RULES}
    assert all(rule.action(GuardsConfig()) == "warn" for rule in RULES)
