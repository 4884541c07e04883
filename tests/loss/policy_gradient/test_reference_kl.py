"""The KL to a reference model inside `policy_gradient_loss`. Its forms against float64: tests/loss/test_accuracy.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_same, with_gradients
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import REFERENCE_KLS, eager, frozen_or_all, fused, fused_output
from problem import Problem, make_problem
from property_settings import PROPERTY

from fastkl import loss, reference

estimates = pytest.mark.parametrize("ref_kl", ["k1", "k2", "k3"])


@pytest.mark.parametrize("options", REFERENCE_KLS.values(), ids=REFERENCE_KLS)
def test_the_metric_is_the_mean_of_what_is_added(options: dict[str, Any]) -> None:
    p = make_problem((4, 8))
    counted = (p.mask != 0) & (p.tokens != -100)
    logprobs = eager("linear_logprobs", p)
    kl = reference.reference_kl(logprobs, p.teacher_logprobs, options.get("ref_kl", "k3"))
    if options.get("ref_kl_ratio", True):
        kl = kl * reference.importance_ratio(logprobs, p.sampler_logprobs, options.get("truncate_ratio"))
    for coef in (0.3, 0.0):  # without a coefficient it is measured
        found = fused_output("reference_kl", p, ref_kl_coef=coef, **options).metrics["ref_kl"]
        torch.testing.assert_close(found, kl[counted].mean())
    assert "ref_kl" not in fused_output("policy_gradient", p).metrics


@frozen_or_all
@estimates
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "none"])
def test_it_is_reduced_as_the_loss_is(reduction: str, ratio: str, ref_kl: str, needs: tuple[str, ...]) -> None:
    p, options = make_problem((3, 6), seed=4), {"reduction": reduction, "ratio": ratio, "ref_kl": ref_kl}
    assert_same(*(with_gradients(f, "reference_kl", p, needs, **options) for f in (fused, eager)))


@estimates
@pytest.mark.parametrize("skip", [True, False])
def test_it_acts_where_the_advantage_is_0(ref_kl: str, skip: bool) -> None:
    p = make_problem((3, 6))
    p = p._replace(advantages=torch.zeros_like(p.advantages))
    ours, exact = (with_gradients(f, "reference_kl", p, ref_kl=ref_kl, skip_zero_rows=skip) for f in (fused, eager))
    assert_same(ours, exact)
    assert ours.gradients["hidden"].abs().max() > 0


def test_it_costs_no_gemm(gemms: dict[str, list[int]]) -> None:
    """3 units with a trained head."""
    p = make_problem((10,))._replace(mask=None)
    with_gradients(fused, "reference_kl", p)
    counted = int((p.tokens != -100).sum())
    assert {name: sum(rows) for name, rows in gemms.items()} == dict.fromkeys(gemms, counted)


def test_the_policy_as_its_own_reference() -> None:
    """k and its gradient are 0, but for k1, whose gradient is that of ℓ."""
    p = make_problem((8,))._replace(mask=None)
    own = p._replace(teacher_logprobs=eager("linear_logprobs", p))
    for ref_kl in ("k2", "k3"):
        options = {"ref_kl": ref_kl, "ref_kl_ratio": False}
        with_kl, without = (with_gradients(fused, "reference_kl", own, ref_kl_coef=c, **options) for c in (2.0, 0.0))
        assert_same(with_kl, without)


@pytest.mark.parametrize("gap", [20.5, 100.0, torch.inf])
@estimates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_beyond_20_nats_it_is_a_constant(dtype: torch.dtype, ref_kl: str, gap: float) -> None:
    p = make_problem((2,), dtype=dtype)
    p = p._replace(tokens=torch.tensor([3, 4]), mask=None, advantages=torch.zeros(2, dtype=dtype))
    p = p._replace(teacher_logprobs=eager("linear_logprobs", p) - torch.tensor([gap, 0.5], dtype=dtype))
    output = fused_output("reference_kl", p, ref_kl=ref_kl, ref_kl_ratio=False)
    assert output.metrics["ref_kl"].isfinite()
    assert_same(*(with_gradients(f, "reference_kl", p, ref_kl=ref_kl) for f in (fused, eager)), 1e-5)
    options = {"ref_kl": ref_kl, "ref_kl_ratio": False, "reduction": "none"}
    gradients = with_gradients(fused, "reference_kl", p, ("hidden",), **options).gradients["hidden"]
    assert (gradients[0] == 0).all()
    assert (gradients[1] != 0).any()


@estimates
@pytest.mark.parametrize("method", ["importance_sampling", "reinforce", "ppo", "cispo"])
@pytest.mark.parametrize("skip", [True, False])
def test_an_impossible_token_is_never_nan(method: str, ref_kl: str, skip: bool) -> None:
    """For neither policy, for the student alone, for the reference alone."""
    p = make_problem((3,), dtype=torch.float32)._replace(
        bias=torch.zeros(11).index_fill(0, torch.tensor([4]), -torch.inf),
        tokens=torch.tensor([4, 4, 2]),
        advantages=torch.tensor([0.0, 0.0, 1.0]),
        teacher_logprobs=torch.tensor([-torch.inf, -2.0, -torch.inf]),
        mask=None,
    )
    options = {"method": method, "ref_kl": ref_kl, "skip_zero_rows": skip}
    value, gradients = with_gradients(fused, "reference_kl", p, ("hidden",), **options)
    assert value.isfinite()
    assert gradients["hidden"].isfinite().all()
    assert all(metric.isfinite() for metric in fused_output("reference_kl", p, **options).metrics.values())


class Distributions:
    """A policy, an older one and a reference over all tokens of one position."""

    def __init__(self) -> None:
        p = make_problem((1,), vocabulary=7, dim=4, seed=5)
        self.hidden, self.weight = p.hidden, p.weight
        z = p.hidden @ p.weight.t()
        self.log_old = torch.log_softmax(0.5 * z + 0.3 * p.bias, -1)[0]
        self.log_ref = torch.log_softmax(p.bias - z, -1)[0]

    def log_policy(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ self.weight.t(), -1)[0]

    def expected_gradient(self, weights: torch.Tensor, **options: Any) -> torch.Tensor:
        """Σ_tokens weight · d loss / d hidden."""
        hidden = self.hidden.clone().requires_grad_()
        tokens = torch.arange(7)
        losses = loss.policy_gradient_loss(
            hidden.expand(7, -1),
            self.weight,
            tokens,
            torch.zeros(7),
            self.log_old,
            ref_logprobs=self.log_ref,
            ref_kl_coef=1.0,
            reduction="none",
            **options,
        ).loss
        return torch.autograd.grad(losses, hidden, weights)[0]

    def gradient_of(self, kl: Any) -> torch.Tensor:
        hidden = self.hidden.clone().requires_grad_()
        return torch.autograd.grad(kl(self.log_policy(hidden)), hidden)[0]


def test_what_each_estimate_minimises() -> None:
    """In expectation over the token, as the docstring says."""
    one = Distributions()
    policy, old = one.log_policy(one.hidden).exp(), one.log_old.exp()
    reverse = one.gradient_of(lambda log_p: (log_p.exp() * (log_p - one.log_ref)).sum())
    forward = one.gradient_of(lambda log_p: -(one.log_ref.exp() * log_p).sum())
    torch.testing.assert_close(one.expected_gradient(policy, ref_kl="k1"), torch.zeros_like(reverse))
    torch.testing.assert_close(one.expected_gradient(policy, ref_kl="k2"), reverse)
    torch.testing.assert_close(one.expected_gradient(policy, ref_kl="k3"), forward)
    for ref_kl in ("k1", "k3"):
        found = one.expected_gradient(old, ref_kl=ref_kl, ref_kl_ratio=True)
        torch.testing.assert_close(found, reverse)


@PROPERTY
@given(st.integers(0, 2**31), st.sampled_from(["k1", "k2", "k3"]), st.booleans(), st.integers(1, 9))
def test_it_adds_to_the_loss(seed: int, ref_kl: str, ratio: bool, chunk_size: int) -> None:
    """Loss(A, β) = loss(A, 0) + loss(0, β), whatever the chunks."""
    p = make_problem((9,), seed=seed)
    options = {"ref_kl": ref_kl, "ref_kl_ratio": ratio, "chunk_size": chunk_size}

    def found(p: Problem, coef: float) -> Any:
        return with_gradients(fused, "reference_kl", p, ref_kl_coef=coef, **options)

    both, first, second = found(p, 0.7), found(p, 0.0), found(p._replace(advantages=0 * p.advantages), 0.7)
    torch.testing.assert_close(both.value, first.value + second.value)
    for field, gradient in both.gradients.items():
        torch.testing.assert_close(gradient, first.gradients[field] + second.gradients[field])
