"""Runs with rewards, environments, given completions and partial rollouts, end to end on tiny models."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from nods import Nods
from run_cases import Run, check_equal, check_moments, counted, interrupt, run, token_logprobs
from run_settings import distillation
from tiny_data import sums, write_jsonl
from transformers import AutoModelForCausalLM

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.environments import ENVIRONMENTS
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler


@pytest.fixture(autouse=True)
def nods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENVIRONMENTS, "nods", Nods)


def check_first_update(folder: Path, done: Run) -> None:
    """Its gradient is that of −Σ A ℓ over the tokens that count, per token, from all the logits."""
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    losses = []
    for sample in done.samples:
        losses.append(-token_logprobs(model, sample) * torch.tensor(counted(sample, "advantages")))
    torch.cat(losses).mean().backward()
    check_moments(done.folder, model)


ONE: dict[str, object] = {"optim__steps": 1, "optim__max_grad_norm": "null"}


def test_reinforcement_learning_without_a_teacher(folder: Path, tmp_path: Path) -> None:
    rewards = {"reward__grader": "regex:[0-9]", "reward__normalize": "true", "sampling__samples_per_prompt": 4}
    options = {"teacher__path": "", "loss__kl_coef": 0, "batch__max_tokens": 40}
    done = run(tmp_path / "run", folder, **options, **rewards, **ONE)
    (row,), samples = done.metrics, done.samples
    assert "teacher_kl" not in row
    groups = defaultdict(list)
    for sample in samples:
        groups[sample["prompt_index"]].append(sample)
    for group in groups.values():
        assert abs(sum(sample["reward_advantage"] for sample in group)) < 1e-6
    scores = [sample["reward"] for sample in samples]
    assert row["reward/mean"] == pytest.approx(sum(scores) / len(scores))
    assert 0 < row["reward/mean"] < 1
    equal = [len({sample["reward"] for sample in group}) == 1 for group in groups.values()]
    assert row["reward/groups_without_signal"] == pytest.approx(sum(equal) / len(equal))
    check_first_update(folder, done)


@pytest.mark.parametrize(
    "teacher",
    [{}, {"teacher__path": "", "teacher__self": "live", "teacher__context__system": "in words"}],
    ids=["other", "told"],
)
def test_a_reward_that_the_teacher_weighs(folder: Path, tmp_path: Path, teacher: dict[str, object]) -> None:
    """It alone says whether a sample is encouraged, whatever the teacher thinks of it."""
    options = {"reward__grader": "regex:[0-9]", "sampling__samples_per_prompt": 4, "loss__kl_coef": 0, **teacher}
    done = run(tmp_path / "run", folder, **options, loss__redistribute=0.5, loss__redistribute_clip=0.3, **ONE)
    factors = set()
    for sample in done.samples:
        gaps = torch.tensor(counted(sample, "teacher_logprobs")) - torch.tensor(counted(sample, "sampler_logprobs"))
        reward = sample["reward_advantage"]
        factor = 0.5 + 0.5 * (gaps * (1 if reward > 0 else -1)).exp().clamp(0.7, 1.3)
        assert counted(sample, "advantages") == pytest.approx((reward * factor).tolist(), abs=1e-6)
        factors |= {round(value, 4) for value in factor.tolist() if reward}
    assert len(factors) > 2
    check_first_update(folder, done)


@pytest.mark.parametrize("role", ["null", "user"])
def test_environment_tokens_have_no_gradient(folder: Path, tmp_path: Path, role: str) -> None:
    turns = {"environment__name": "nods", "environment__role": role, "sampling__max_new_tokens": 24}
    rewards = {"reward__grader": "environment", "sampling__samples_per_prompt": 2}
    done = run(tmp_path / "run", folder, **turns, **rewards, **ONE)
    (row,), samples = done.metrics, done.samples
    replied = 0
    for sample in samples:
        after = len(sample["ids"]) - sample["completion_length"]
        told = [i for i in range(after, len(sample["ids"])) if not sample["loss_mask"][i]]
        replied += bool(told)
        for i in told:
            assert sample["advantages"][i] == sample["teacher_logprobs"][i] == sample["sampler_logprobs"][i] == 0
        assert all(sample["sampler_logprobs"][i] < 0 for i in range(after, len(sample["ids"])) if i not in told)
    assert replied > 0
    assert row["reward/mean"] > 0
    assert row["sampler_mismatch/mean_abs"] < 1e-5  # every log-prob stands at its token
    check_first_update(folder, done)


def test_mixed_steps(folder: Path, tmp_path: Path) -> None:
    mixed = {"sampling__on_policy_fraction": 0.5, "sampling__given_coef": 0.3}
    done = run(tmp_path / "run", folder, **mixed, **ONE)
    (row,), samples = done.metrics, done.samples
    given = [sample for sample in samples if sample["given"]]
    assert len(given) == 3
    for sample in given:
        text = sums()[sample["prompt_index"]]["completion"]
        assert sample["text"].endswith(f"<a>{text}<eos>")
        assert sample["advantages"] == pytest.approx([0.3 * counted for counted in sample["loss_mask"]])
    tokens = sum(sum(sample["loss_mask"]) for sample in given)
    assert row["given/nll"] == pytest.approx(-sum(sum(sample["old_logprobs"]) for sample in given) / tokens, rel=1e-5)
    assert row["sampler_mismatch/mean_abs"] < 1e-5
    check_first_update(folder, done)


def test_all_given_is_supervised(folder: Path, tmp_path: Path) -> None:
    _, rows, samples = run(tmp_path / "run", folder, sampling__on_policy_fraction=0, optim__steps=8, optim__lr=0.03)
    assert all(sample["given"] for sample in samples)
    assert rows[-1]["given/nll"] < rows[0]["given/nll"]


def test_a_step_whose_samples_are_all_dropped_moves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = GenerateSampler.sample

    def truncated(self: GenerateSampler, prompts: list[list[int]], **options: Any) -> list[Completion]:
        return [completion._replace(truncated=True) for completion in sample(self, prompts, **options)]

    monkeypatch.setattr(GenerateSampler, "sample", truncated)
    _, rows, samples = run(tmp_path / "run", folder, sampling__drop_truncated="true")
    assert {row["completions/dropped_fraction"] for row in rows} == {1.0}
    assert all(row["optim/grad_norm"] == 0 for row in rows)
    assert samples == []


PARTIAL: dict[str, object] = {
    "optim__steps": 6,
    "checkpoint__every": 2,
    "sampling__max_new_tokens": 16,
    "sampling__initial_new_tokens": 8,
    "sampling__growth_steps": 4,
    "sampling__tokens_per_step": 3,
    "sampling__on_policy_fraction": 0.7,
    "reward__grader": "regex:[0-9]",
    "reward__baseline": "none",
}


def test_partial_rollouts_resume_exactly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = run(tmp_path / "whole", folder, **PARTIAL).samples
    assert any(sample["unfinished"] for sample in samples)
    assert max(sample["completion_length"] for sample in samples if not sample["given"]) > 8
    interrupt(monkeypatch, distillation(tmp_path / "parts", folder, **PARTIAL), 3)
    run(tmp_path / "parts", folder, **PARTIAL)
    check_equal(tmp_path / "parts", tmp_path / "whole")


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "nothing-to-learn": ({"loss__kl_coef": 0}, r"loss\.kl_coef is 0 and reward\.grader is null"),
    "one-sample-groups": ({"reward__grader": "boxed"}, r"samples_per_prompt is 1"),
    "no-rewards": (
        {"reward__grader": "environment", "reward__baseline": "none", "environment__name": "calculator"},
        "gives no rewards",
    ),
    "no-environment": ({"reward__grader": "environment", "reward__baseline": "none"}, r"environment\.name is null"),
    "reward-without-grader": ({"reward__coef": 2}, r"reward\.coef is 2.*reward\.grader is null"),
    "normalize": (
        {"reward__grader": "boxed", "reward__baseline": "none", "reward__normalize": "true"},
        "there is no group",
    ),
    "turns-of-text": (
        {"environment__name": "calculator", "environment__role": "user", "data__chat_template": "false"},
        r"environment\.role is 'user', but data\.chat_template is false",
    ),
    "trust": ({"environment__name": "calculator", "environment__trust": "true"}, r"environment\.trust is true"),
    "half-a-schedule": ({"sampling__growth_steps": 3}, "set both"),
    "portion": ({"sampling__tokens_per_step": 8}, r"below sampling\.max_new_tokens \(8\)"),
    "portion-of-a-conversation": (
        {"sampling__tokens_per_step": 4, "environment__name": "calculator"},
        "a conversation ends in its step",
    ),
    "portion-of-a-group": (
        {"sampling__tokens_per_step": 4, "reward__grader": "boxed", "sampling__samples_per_prompt": 2},
        "end in different steps",
    ),
    "graded-data": ({"sampling__on_policy_fraction": 0, "reward__grader": "boxed"}, "given completions are not graded"),
    "given-coef": ({"sampling__given_coef": 0.5}, r"on_policy_fraction is 1"),
    "lengths": ({"sampling__min_completion_tokens": 9}, "they must be in order"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(folder: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", folder, **options)
    assert not (tmp_path / "run").exists()


def test_given_completions_must_be_there(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "1"}])
    with pytest.raises(ConfigError, match=r"bare\.jsonl:1: no `completion`"):
        run(tmp_path / "run", folder, sampling__on_policy_fraction=0.5, data__path=data)
