"""Rewards: graders by name, and advantages within the samples of a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY
from tiny_data import write_jsonl
from tiny_models import tokenizer

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.config.reward import RewardConfig
from fastkl.trainer.data.prompts import encode_prompts
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.objectives.advantages import group_advantages, over_group_std, set_advantages, set_reward_advantages
from fastkl.trainer.rollouts.grading.named import named_grader

ROW = Prompt("rows.jsonl:1", "1+1=", answer="2", metadata={"kind": "sum"})


def grade(name: str, completion: str, row: Prompt = ROW, trusted: bool = False) -> float:
    return named_grader("reward.grader", name, trusted=trusted)(completion, row)


@pytest.mark.parametrize(
    ("name", "completion", "score"),
    [
        ("last_number", "so 2", 1),
        ("boxed", r"\boxed{3}", 0),
        (r"regex:^\d+$", "22", 1),
        (r"regex:^\d+$", "2 2", 0),
        (r"regex:is (?P<answer>\d+)\.", "it is 2.", 1),
        (r"regex:is (?P<answer>\d+)\.", "it is 3.", 0),
        (r"regex:a:b", "a:b", 1),
    ],
)
def test_named_graders(name: str, completion: str, score: float) -> None:
    assert grade(name, completion) == score


def test_a_users_own_function_is_run_only_if_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(half=lambda completion, row: 0.5 * (completion == row.metadata["kind"]))
    monkeypatch.setitem(sys.modules, "own_graders", own)
    assert grade("function:own_graders.half", "sum", trusted=True) == 0.5
    with pytest.raises(ConfigError, match=r"reward\.grader names 'own_graders\.half'.*reward\.trust_grader to true"):
        grade("function:own_graders.half", "sum")


@pytest.mark.parametrize(
    ("name", "trusted", "message"),
    [
        ("nothing", False, r"reward\.grader is 'nothing'; known are boxed, last_number, math_verify, regex:PATTERN"),
        ("regex:", False, "known are"),
        ("regex:(", False, "not a regular expression"),
        ("reasoning_gym:no_such_set", False, "no_such_set"),
        ("function:missing_module.f", True, r"missing_module\.f.*cannot be imported"),
        ("function:json.no_such_name", True, "cannot be imported"),
        ("function:json.__name__", True, r"json\.__name__', a str, which cannot be called; name a function"),
        ("function:json", True, "cannot be imported"),
        ("function:broken_module.f", True, r"cannot be imported: NameError: name 'nothing' is not defined"),
        ("boxed", True, r"trust_grader is true but reward\.grader is 'boxed'"),
    ],
)
def test_bad_names(name: str, trusted: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("nothing\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        grade(name, "", trusted=trusted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None])
def test_a_score_that_is_no_number_names_the_row(monkeypatch: pytest.MonkeyPatch, value: object) -> None:
    monkeypatch.setitem(sys.modules, "own_graders", SimpleNamespace(broken=lambda completion, row: value))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the grader function:own_graders\.broken gave"):
        grade("function:own_graders.broken", "", trusted=True)


def test_reasoning_gym_scores_what_the_row_carries(tmp_path: Path) -> None:
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("countdown", size=1, seed=3)[0]  # many right answers: only a verifier can tell
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}],
    )
    (row,) = load_prompts(DataConfig(path=str(path)))
    for name in ("reasoning_gym:countdown", "reasoning_gym"):
        assert grade(name, entry["answer"], row) == 1.0
        assert grade(name, f"so <answer> {entry['answer']} </answer>.", row) == 1.0
        assert grade(name, "1+1", row) < 0.5


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    row = Prompt("r", "q", answer="1/2")
    assert grade("math_verify", r"thus \boxed{0.5}", row) == 1.0
    assert grade("math_verify", r"$\frac{1}{2}$", row) == 1.0
    assert grade("math_verify", r"\boxed{2}", row) == 0.0
    assert grade("math_verify", r"\boxed{\sqrt{8}}", Prompt("r", "q", answer=r"2\sqrt{2}")) == 1.0


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"math-verify: pip install"):
        grade("math_verify", "")
    with pytest.raises(ConfigError, match=r"pip install reasoning-gym"):
        grade("reasoning_gym", "")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("boxed", {"prompt": "1"}, r"rows\.jsonl:1: no `answer`; reward\.grader needs one"),
        ("reasoning_gym", {"prompt": "1", "answer": "2"}, r"rows\.jsonl:1: no `metadata`"),
        (r"regex:(?P<answer>\d)", {"prompt": "1"}, "no `answer`"),
    ],
)
def test_rows_must_have_what_the_grader_needs(tmp_path: Path, name: str, row: dict[str, str], message: str) -> None:
    config = DataConfig(path=str(write_jsonl(tmp_path / "rows.jsonl", [row])))
    prompts = encode_prompts(load_prompts(config), tokenizer(), config)
    with pytest.raises(ConfigError, match=message):
        named_grader("reward.grader", name, trusted=False).check_rows(prompts, "reward.grader")


rewards_of_groups = st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=20)


@PROPERTY
@given(pairs=rewards_of_groups, normalize=st.booleans())
def test_advantages_of_a_group_sum_to_zero(pairs: list[tuple[int, float]], normalize: bool) -> None:
    groups, rewards = torch.tensor([g for g, _ in pairs]), torch.tensor([r for _, r in pairs], dtype=torch.float64)
    advantages = group_advantages(rewards, groups)
    if normalize:
        advantages = over_group_std(advantages, rewards, groups)
    for group in groups.unique():
        own = advantages[groups == group]
        assert abs(own.sum().item()) < 1e-6
        varied = len(set(rewards[groups == group].tolist())) > 1
        if normalize and varied and rewards[groups == group].std(correction=0) > 1e-6:
            assert own.std(correction=0).item() == pytest.approx(1)
        if not varied:
            assert (own == 0).all()


def graded(index: int, reward: float | None) -> Sample:
    sample = make_sample([1, 2], [3, 4, 5], index, [-1.0, -2.0, -3.0])
    sample.teacher_logprobs = [0.0, 0.0, -1.5, -2.0, -2.0]
    sample.reward = reward
    return sample


def test_rewards_are_added_to_the_kl() -> None:
    samples = [graded(0, 1.0), graded(0, 0.0), graded(1, 2.0), graded(1, 2.0), graded(1, None)]
    for place, sample in enumerate(samples):
        sample.place = place
    metrics = set_reward_advantages(samples, RewardConfig(grader="boxed", coef=2.0))
    assert metrics == pytest.approx(
        {"reward/mean": 1.25, "reward/std": 0.6875**0.5, "reward/groups_without_signal": 0.5}
    )
    set_advantages(samples, LossConfig(kl_coef=0.5, discount=1.0))
    kl = [0.0, 0.0, -0.5 * (0.5 - 1.0), -0.5 * -1.0, -0.5 * -1.0]
    for sample, environment in zip(samples, [1.0, -1.0, 0.0, 0.0, 0.0], strict=True):
        wanted = [0.0, 0.0, *(value + environment for value in kl[2:])]
        assert sample.advantages == pytest.approx(wanted)


def test_the_teacher_weighs_the_reward() -> None:
    """Its gaps are +0.5, 0 and −1 … with the KL beside it or without; given completions and the prompt stay as they are."""
    ratios = torch.tensor([-1.5, -2.0, -2.0]) - torch.tensor([-1.0, -2.0, -3.0])
    for reward, coef in ((3.0, 0.0), (-3.0, 0.5)):
        sample, given = graded(0, reward), graded(1, None)
        given.given = True
        set_reward_advantages([sample], RewardConfig(grader="boxed", baseline="none"))
        loss = LossConfig(kl_coef=coef, redistribute=0.5, redistribute_clip=0.3)
        set_advantages([sample, given], loss, given_coef=0.25)
        factor = (ratios * (1 if reward > 0 else -1)).exp().clamp(0.7, 1.3)
        wanted = reward * (0.5 + 0.5 * factor) + coef * ratios
        assert sample.advantages == pytest.approx([0.0, 0.0, *wanted.tolist()])
        assert given.advantages.tolist() == [0.0, 0.0, 0.25, 0.25, 0.25]


def test_without_a_teacher_the_reward_is_all() -> None:
    sample = graded(0, 3.0)
    sample.teacher_logprobs = []
    set_reward_advantages([sample], RewardConfig(grader="boxed", baseline="none"))
    set_advantages([sample], LossConfig(kl_coef=0.0))
    assert sample.advantages.tolist() == [0.0, 0.0, 3.0, 3.0, 3.0]


def test_a_given_completion_is_weighted_likelihood() -> None:
    sample = graded(0, None)
    sample.given = True
    set_advantages([sample], LossConfig(kl_coef=5.0, discount=0.5), given_coef=0.25)
    assert sample.advantages.tolist() == [0.0, 0.0, 0.25, 0.25, 0.25]
