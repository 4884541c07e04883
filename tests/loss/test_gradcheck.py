"""Every way through the losses under torch.autograd.gradcheck in float64: analytic against numeric derivatives.

Each option of a loss is held against autograd of the reference in test_accuracy.py, and so are the methods with a
stop-gradient: it makes value and gradient two different functions, which no finite difference can see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import HEADS, NEEDS, POLICIES, REDUCED, WAYS, each_head, each_need, each_way, fused, fused_output
from problem import Problem, make_problem
from torch import Tensor

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


@each_head
@each_way
def test_head_options(name: str, head: dict[str, Any]) -> None:
    check(name, make_problem(vocabulary=7, dim=3), NEEDS["all"], **head)


@pytest.mark.parametrize("needs", [NEEDS["frozen-head"], NEEDS["bias-only"], ("hidden", "weight")], ids="-".join)
@each_way
def test_needs(name: str, needs: tuple[str, ...]) -> None:
    p = make_problem(vocabulary=7, dim=3)
    check(name, p if "bias" in needs else p._replace(bias=None, mask=None), needs, **HEADS["all-chunked"])


@pytest.mark.parametrize(("bool_mask", "skip"), [(True, True), (False, True), (False, False)])
@each_way
def test_masks(name: str, bool_mask: bool, skip: bool) -> None:
    mask = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 1.0], dtype=torch.float64)
    tokens = torch.tensor([-100, -100, 0, 6, 3, 3])  # ignored with and without the mask; masked with a token
    p = make_problem(vocabulary=7, dim=3)._replace(tokens=tokens, mask=mask != 0 if bool_mask else mask)
    check(name, p, NEEDS["all"], skip_zero_rows=skip, chunk_size=2)


@pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in WAYS if name in REDUCED])
def test_reductions(name: str, reduction: dict[str, Any]) -> None:
    p = make_problem((2, 3), vocabulary=7, dim=3)
    check(name, p, NEEDS["all"], chunk_size=4, **reduction)
    if reduction == REDUCTIONS["none"]:
        check(name, p, NEEDS["frozen-head"], chunk_size=4, **reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("policy", ["reinforce", "ppo", "ppo-dual_clip"])
def test_policies(policy: str, reduction: str) -> None:
    p = make_problem((24,), vocabulary=5, dim=2)
    if policy.startswith("ppo"):
        clipped = fused_output("policy_gradient", p, **POLICIES[policy]).metrics["clip_fraction"]
        assert 0 < clipped < 1, "both branches must be checked"
    check("policy_gradient", p, NEEDS["all"], reduction=reduction, **POLICIES[policy])


@pytest.mark.parametrize("ref_kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", [False, True])
def test_reference_kl(ratio: bool, ref_kl: str) -> None:
    p = make_problem((6,), vocabulary=5, dim=2)
    for options in ({}, {"reduction": "none", "ratio_bounds": (0.8, 1.5), "entropy_coef": 0.1}):
        check("reference_kl", p, NEEDS["all"], ref_kl=ref_kl, ref_kl_ratio=ratio, chunk_size=4, **options)


@each_need
@pytest.mark.parametrize("changes", [{}, {"tokens": None}, {"teacher_bias": None}], ids=["", "no-tokens", "no-bias"])
def test_teacher_options(changes: dict[str, None], needs: tuple[str, ...]) -> None:
    p = make_problem(vocabulary=7, dim=3)  # the teacher's hidden size is 5
    check("reverse_kl", p, needs, teacher_logit_scale=0.6, teacher_softcap=3.0, temperature=1.3, **changes)
