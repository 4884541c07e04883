"""Every loss and option under torch.autograd.gradcheck in float64: analytic against numeric derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import HEADS, LOSSES, NEEDS, POLICIES, Problem, fused, fused_output, make_problem
from torch import Tensor

# A stop-gradient makes value and gradient two different functions, which no finite difference can see; those cases are
# held against autograd of the reference in test_loss_accuracy.py.
SMOOTH_POLICIES = ("importance_sampling", "reinforce", "ppo", "ppo-dual_clip")
REDUCTIONS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "mean-number": {"normalizer": 3.7},
    "mean-tensor": {"normalizer": torch.tensor(7)},
}


def check(name: str, p: Problem, needs: tuple[str, ...], **options: Any) -> None:
    p = p.leaves(needs)

    def function(*tensors: Tensor) -> Tensor:
        return fused(name, p._replace(**dict(zip(needs, tensors, strict=True))), **options)

    assert torch.autograd.gradcheck(function, tuple(getattr(p, field) for field in needs))


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", LOSSES)
def test_head_options(name: str, head: dict[str, Any], needs: tuple[str, ...]) -> None:
    check(name, make_problem(vocabulary=7, dim=3), needs, **head)


@pytest.mark.parametrize("needs", [NEEDS["frozen-head"], ("hidden", "weight")], ids=["frozen-head", "trainable"])
@pytest.mark.parametrize("name", LOSSES)
def test_without_bias_and_mask(name: str, needs: tuple[str, ...]) -> None:
    check(name, make_problem(vocabulary=7, dim=3)._replace(bias=None, mask=None), needs)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no-skip"])
@pytest.mark.parametrize("bool_mask", [True, False], ids=["bool-mask", "weight-mask"])
@pytest.mark.parametrize("name", LOSSES)
def test_masks(name: str, bool_mask: bool, skip: bool) -> None:
    mask = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    tokens = torch.tensor([-100, -100, 0, 6, 3, 3])  # ignored with and without the mask; masked with a token
    p = make_problem(vocabulary=7, dim=3)._replace(tokens=tokens, mask=mask != 0 if bool_mask else mask)
    check(name, p, NEEDS["all"], skip_zero_rows=skip, chunk_size=2)


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("needs", [NEEDS["frozen-head"], NEEDS["all"]], ids=["frozen-head", "all"])
@pytest.mark.parametrize("name", LOSSES[1:])
def test_reductions(name: str, needs: tuple[str, ...], reduction: dict[str, Any]) -> None:
    check(name, make_problem((2, 3), vocabulary=7, dim=3), needs, chunk_size=4, **reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("policy", SMOOTH_POLICIES)
@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_policies(needs: tuple[str, ...], policy: str, reduction: str) -> None:
    p = make_problem((24,), vocabulary=5, dim=2)
    if policy.startswith("ppo"):
        clipped = fused_output("policy_gradient", p, **POLICIES[policy]).metrics["clip_fraction"]
        assert 0 < clipped < 1, "both branches must be checked"
    check("policy_gradient", p, needs, reduction=reduction, **POLICIES[policy])


def test_reinforce_without_sampler() -> None:
    """With r = 1 by definition only REINFORCE keeps a value that follows its gradient."""
    p = make_problem(vocabulary=7, dim=3)._replace(sampler_logprobs=None)
    check("policy_gradient", p, NEEDS["all"], method="reinforce")


def test_truncation_that_cuts_nothing() -> None:
    check("policy_gradient", make_problem(vocabulary=7, dim=3), NEEDS["all"], truncate_ratio=1e3)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_sampled_reverse_kl_options(needs: tuple[str, ...]) -> None:
    p = make_problem((2, 5), vocabulary=5, dim=2)
    options = {
        "discount": 0.6,
        "coef": 1.4,
        "env_advantages": torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5),
        "sequence_ids": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]),
    }
    check("sampled_reverse_kl", p, needs, **options)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "no-tokens"])
def test_reverse_kl_teacher_options(tokens: bool, needs: tuple[str, ...]) -> None:
    p = make_problem(vocabulary=7, dim=3)  # the teacher's hidden size is 5
    options = {"teacher_logit_scale": 0.6, "teacher_softcap": 3.0, "temperature": 1.3}
    check("reverse_kl", p, needs, **options, **({} if tokens else {"tokens": None}))
    check("reverse_kl", p._replace(teacher_bias=None), needs, **options)
