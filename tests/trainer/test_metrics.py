"""The table of metrics says neither less nor more than what runs write, and docs/metrics/metrics.md is made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from context_cases import SIBLING
from launches import REPOSITORY
from run_cases import distilled, tuned
from run_settings import distillation, evaluated, training
from tiny_data import read_jsonl

from fastkl.trainer.metrics import GROUPS, METRICS, PLACEHOLDERS, PROGRESS, figures, find, page
from fastkl.trainer.runs.report.page import PAGE

# Together they have every metric but those of NOT_HERE; heads of one size, for the mismatch of the divergences.
RUNS: dict[str, dict[str, Any]] = {
    "rewards": {
        "reward__grader": "regex:[0-9]",
        "sampling__samples_per_prompt": 2,
        "sampling__max_completion_tokens": 7,
        "loss__old_logprobs": "recompute",
        **SIBLING,
        "teacher__context__sibling__succeeded": "plain",
        "teacher__tokenizer": "own",
    },
    "given": {
        "sampling__on_policy_fraction": 0.5,
        "student__dtype": "bfloat16",
        "eval__temperature": [0, 1],
        "eval__samples_per_prompt": 2,
    },
    "mixture": {
        "mixture": {"sums": {}, "other": {"weight": 2}},
        "loss__backward": "sparse",
        "loss__method": "ppo",
    },
    "tamed": {
        "loss__baseline": "kl",
        "loss__advantage_clip": 1.0,
        "loss__extrapolate": 1.25,
        "loss__ratio_bounds": [0.5, 2.0],
        "reference__path": "student",
    },
    "divergence": {"loss__objective": "jsd", "teacher__context__system": "in words"},
    "top_k": {
        "loss__objective": "top_k",
        "loss__top_k_of": "both",
        "loss__weights": ["skip_first:1"],
        "loss__forward_kl_above": 1.0,
        "loss__top_k": 2,
        "loss__top_k_tail": "sampled",
    },
}
# A sampling server's: tests/trainer/rollouts/samplers/test_served.py and tests/trainer/rollouts/test_ahead.py. A cache's:
# tests/trainer/teachers/test_cached.py.
NOT_HERE = {"time/push_weights", "time/rollouts", "staleness/mean", "staleness/max"}
NOT_HERE |= {"teacher_cache/hits", "teacher_cache/misses"}
# tests/trainer/teachers/alignment/test_common_runs.py
NOT_HERE |= {"alignment/compared_fraction", "policy/rest_mass", "policy/teacher_rest_mass"}
NOT_HERE |= {"guards/RULE", "advantages/top_share"}  # tests/trainer/runs/guards; a step of more tokens
NOT_HERE |= {f"sampler_mismatch/{name}" for name in ("missing", "missing_se", "slope", "slope_se")}  # the same


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, set[str]]:
    """The names that each run wrote."""
    path = tmp_path_factory.mktemp("metrics")
    small = evaluated(folder, optim__steps=1)
    runs = {}
    for name, options in RUNS.items():
        settings = distillation(path / name, folder, **small, **options)
        settings |= {"reference.path": folder / str(options["reference__path"])} if "reference__path" in options else {}
        if "mixture" in options:
            data = {"data": {"path": str(folder / "sums.jsonl")}}
            entries = {data_set: entry | data for data_set, entry in options["mixture"].items()}
            settings |= {"data.path": "null", "mixture": json.dumps(entries)}
        runs[name] = distilled(settings)
    runs["sft"] = tuned(training(path / "sft", folder, examples_per_step=4, **small))
    return {
        name: {key for row in read_jsonl(run / "metrics.jsonl") for key in row} - {"step"} for name, run in runs.items()
    }


def test_every_metric_of_a_run_is_in_the_table(written: dict[str, set[str]]) -> None:
    names = set().union(*written.values())
    assert [name for name in sorted(names) if find(name) is None] == []


def test_every_metric_of_the_table_is_written(written: dict[str, set[str]]) -> None:
    found = {entry.name for names in written.values() for name in names if (entry := find(name))}
    assert METRICS.keys() - found == NOT_HERE
    assert all(METRICS[name].when for name in NOT_HERE)


def test_what_has_no_condition_is_in_every_run(written: dict[str, set[str]]) -> None:
    always = {entry.name for entry in METRICS.values() if not entry.when}
    assert {name: always - names for name, names in written.items() if always - names} == {}


def test_families() -> None:
    assert [find(name) for name in ("teacher_kl/a-b_1", "policy/skewed_reverse_kl_max", "policy/top_k_kl_mean")] == [
        METRICS[name] for name in ("teacher_kl/DATA_SET", "policy/DIVERGENCE_max", "policy/DIVERGENCE_mean")
    ]
    assert [find(f"eval/{name}") for name in ("sums/accuracy_t0.7_se", "pass_at_16_t1e-05", "a-b/mean_length")] == [
        METRICS[f"eval/{name}"] for name in ("accuracy_se", "pass_at_K", "mean_length")
    ]
    assert find("policy/ratio_mean") is METRICS["policy/ratio_mean"]
    assert [
        find(name)
        for name in ("teacher_kl/", "policy/l2_mean", "policy", "teacher_kl/a/b", "eval/x", "eval/a/b/accuracy")
    ] == [None] * 6
    assert all(any(word in entry.name for entry in METRICS.values()) for word in PLACEHOLDERS)


def test_no_name_stands_twice() -> None:
    assert len(METRICS) == sum(len(group.metrics) for group in GROUPS)
    assert set(PROGRESS) <= METRICS.keys()


def test_the_report_has_a_part_for_each_group() -> None:
    text = (PAGE / "page.html").read_text(encoding="utf-8")
    assert all(f'<div id="{group.part}" class="charts' in text for group in GROUPS)


def test_figures_are_in_the_order_of_the_table_and_unknown_names_last() -> None:
    shown = figures(["time/train", "mine", "teacher_kl/b", "teacher_kl/a", "teacher_kl", "loss"])
    assert [figure["name"] for figure in shown] == [
        *("teacher_kl", "loss", "teacher_kl/a", "teacher_kl/b", "time/train", "mine")
    ]
    assert [figure["part"] for figure in shown] == [*["learning"] * 4, "time", "rest"]
    assert shown[-2]["unit"] == "seconds per step"
    assert shown[-1]["unit"] == ""


def test_a_standard_error_is_drawn_on_its_metric() -> None:
    assert [figure["name"] for figure in figures(["eval/accuracy", "eval/accuracy_se"])] == ["eval/accuracy"]


def test_the_document_is_made_from_the_table() -> None:
    text = (REPOSITORY / "docs" / "metrics" / "metrics.md").read_text(encoding="utf-8")
    assert text == "\n".join(page()) + "\n", "run: python -m fastkl.trainer.metrics > docs/metrics/metrics.md"
