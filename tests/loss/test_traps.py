"""Mistakes that distillation code has shipped with, each as a test that would have caught it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_same, with_gradients
from loss_cases import REDUCED, WAYS, each_way, eager, frozen_or_all, fused, fused_output, unreduced
from problem import Problem, generator, make_problem
from torch import Tensor

from fastkl import loss

# Every objective that is the policy gradient when sampler and policy are one (r = 1, nothing clipped).
ON_POLICY = ("importance_sampling", "reinforce", "ppo", "cispo")


class Enumeration:
    """One context and every token of its vocabulary: expectations over the policy are sums, not estimates."""

    def __init__(self, vocabulary: int = 7, dim: int = 4) -> None:
        g = generator(5)
        self.hidden, self.weight, z_teacher, z_sampler = (
            torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in ((dim,), (vocabulary, dim), (vocabulary,), (vocabulary,))
        )
        self.tokens = torch.arange(vocabulary)
        self.log_p, self.log_q, self.log_s = (
            torch.log_softmax(z, -1) for z in (self.weight @ self.hidden, z_teacher, z_sampler)
        )

    def gradient(self, per_token_loss: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        """d/d(hidden, weight) of Σ_y weights(y) · loss(y); `per_token_loss` takes hidden [V, D] and weight."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        losses = per_token_loss(hidden.expand(len(self.tokens), -1), weight)
        return torch.autograd.grad((losses * weights).sum(), (hidden, weight))

    def exact(self) -> tuple[Tensor, Tensor]:
        """The gradient of the reverse KL itself, by autograd."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        log_p = torch.log_softmax(weight @ hidden, -1)
        return torch.autograd.grad((log_p.exp() * (log_p - self.log_q)).sum(), (hidden, weight))


@pytest.mark.parametrize("method", ON_POLICY)
def test_k3_as_a_loss(method: Any) -> None:
    """In expectation over the sampled token the gradient is that of the reverse KL (k3's is that of the forward KL)."""
    one = Enumeration()

    def sampled(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss.sampled_reverse_kl_loss(
            hidden, weight, one.tokens, one.log_q, one.log_p, method=method, reduction="none"
        ).loss

    torch.testing.assert_close(one.gradient(sampled, one.log_p.exp()), one.exact())


def test_estimator_is_unbiased_off_policy() -> None:
    """Tokens from another policy: the ratio, attached to the log-prob and not to the advantage, makes up for it."""
    one = Enumeration()

    def sampled(hidden: Tensor, weight: Tensor) -> Tensor:
        advantages = one.log_q - one.log_p
        return loss.policy_gradient_loss(hidden, weight, one.tokens, advantages, one.log_s, reduction="none").loss

    torch.testing.assert_close(one.gradient(sampled, one.log_s.exp()), one.exact())


def test_gradient_through_the_advantage() -> None:
    """A is a constant: a graph behind advantages, sampler or teacher log-probs gets nothing."""
    p = make_problem()
    for name, fields in (
        ("policy_gradient", ("advantages", "sampler_logprobs", "mask")),
        ("sampled_reverse_kl", ("sampler_logprobs", "teacher_logprobs", "mask")),
    ):
        constant = with_gradients(fused, name, p)
        q = p.leaves(("hidden", "weight", "bias", *fields))
        fused(name, q).backward()
        assert all(getattr(q, f).grad is None for f in fields)
        torch.testing.assert_close(q.weight.grad, constant.gradients["weight"])


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen-head", "trainable"])
def test_missing_ratio(needs: tuple[str, ...]) -> None:
    """Off policy every token's gradient is r times that of REINFORCE."""
    p = make_problem()._replace(mask=None)
    ratio = torch.exp(eager("linear_logprobs", p) - p.sampler_logprobs)
    assert (ratio - 1).abs().min() > 1e-3
    weighted = with_gradients(fused, "policy_gradient", p, needs, reduction="sum")
    by_hand = p._replace(advantages=p.advantages * ratio)
    plain = with_gradients(fused, "policy_gradient", by_hand, needs, reduction="sum", method="reinforce")
    for field in needs:
        torch.testing.assert_close(weighted.gradients[field], plain.gradients[field])


def test_ratio_lost_without_sampler() -> None:
    """r = 1 has value 1 and yet the gradient of log p: the loss is −mean A, its gradient REINFORCE's."""
    p = make_problem()._replace(sampler_logprobs=None, mask=None)
    ours, plain = (with_gradients(fused, "policy_gradient", p, **o) for o in ({}, {"method": "reinforce"}))
    torch.testing.assert_close(ours.value, -p.advantages[p.tokens != -100].mean())
    torch.testing.assert_close(ours.gradients["weight"], plain.gradients["weight"])
    assert ours.gradients["weight"].abs().max() > 0


@pytest.mark.parametrize("vocabulary", [2, 61, 127, 1009])
@pytest.mark.parametrize("level", [-300.0, 0.0, 300.0])
def test_phantom_mass_in_the_vocabulary_tail(vocabulary: int, level: float) -> None:
    """Probabilities sum to 1; a tail read as logit 0 would take all the mass at −300."""
    g = generator(0)
    hidden = torch.randn(1, 3, generator=g).expand(vocabulary, 3)
    weight, bias = torch.randn(vocabulary, 3, generator=g), torch.full((vocabulary,), level)
    logprobs = loss.linear_logprobs(hidden, weight, torch.arange(vocabulary), bias=bias)
    torch.testing.assert_close(logprobs.exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


@frozen_or_all
@pytest.mark.parametrize("upstream", ["expanded", "zeros"])
@each_way
def test_upstream_read_as_its_first_element(name: str, upstream: str, needs: tuple[str, ...]) -> None:
    """With a value for each token: test_accuracy.py. Here the gradient of .sum(), whose stride is 0, and zeros."""
    p = make_problem((4, 3))
    value = torch.tensor(1.5 if upstream == "expanded" else 0.0, dtype=torch.float64).expand(4, 3)
    gradients = []
    for function in (fused, eager):
        q = p.leaves(needs)
        function(name, q, **unreduced(name)).backward(value)
        gradients.append([getattr(q, f).grad for f in needs])
    torch.testing.assert_close(*gradients)


@each_way
def test_low_precision_accumulation_of_weight_gradients(name: str) -> None:
    """512 chunks of one row: a bf16 accumulator would lose most of them, a float32 one rounds once at the end."""
    # All rows pull the same way, so that the sum grows far above its terms.
    p = make_problem((512,), vocabulary=5, dim=4, dtype=torch.bfloat16)
    p = p._replace(
        hidden=p.hidden.abs(), tokens=torch.zeros_like(p.tokens), advantages=p.advantages.abs() + 1, mask=None
    )
    options = {} if name == "linear_logprobs" else {"reduction": "sum"}
    exact = with_gradients(eager, name, p.double(), ("weight", "bias"), **options).gradients
    for chunk_size in (1, 512):
        ours = with_gradients(fused, name, p, ("weight", "bias"), chunk_size=chunk_size, **options).gradients
        for field, gradient in ours.items():
            error = (gradient.double() - exact[field]).abs().max() / exact[field].abs().max()
            assert error < torch.finfo(torch.bfloat16).eps, f"{field} with chunks of {chunk_size}: {error:.1e}"


def far_apart(student_bias: list[float], teacher_bias: list[float]) -> Problem:
    """One token whose logits are the biases."""
    p = make_problem((1,), len(student_bias), dtype=torch.float32)._replace(mask=None, tokens=torch.zeros(1).long())
    zeros = {f: torch.zeros_like(getattr(p, f)) for f in ("hidden", "teacher_hidden")}
    return p._replace(**zeros, bias=torch.tensor(student_bias), teacher_bias=torch.tensor(teacher_bias))


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        pytest.param([0.0, -1e4], [0.0, -torch.inf], 0.0, id="p-underflows-q-zero"),
        pytest.param([0.0, -torch.inf], [0.0, 0.0], 0.6931472, id="p-zero"),
        pytest.param([0.0, -torch.inf], [0.0, -torch.inf], 0.0, id="both-zero"),
        pytest.param([0.0, 0.0], [0.0, -1e4], 4999.307, id="q-underflows"),
    ],
)
def test_zero_times_minus_inf(student: list[float], teacher: list[float], expected: float) -> None:
    p = far_apart(student, teacher)
    result = with_gradients(fused, "reverse_kl", p)
    torch.testing.assert_close(result.value, torch.tensor(expected))
    assert all(g.isfinite().all() for g in result.gradients.values())
    assert float(result.gradients["bias"].sum()) == pytest.approx(0.0, abs=1e-6)


def test_teacher_that_forbids_what_the_student_emits() -> None:
    """The divergence is infinite; hiding that (nan_to_num) would hide a broken teacher."""
    p = far_apart([0.0, 0.0], [0.0, -torch.inf])
    assert float(fused("reverse_kl", p)) == torch.inf


MASK_DTYPES = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in WAYS if name in REDUCED])
def test_mask_dtypes(name: str, dtype: torch.dtype) -> None:
    """attention_mask comes as int64, a comparison as bool: both mean the same, and ~ is never applied to an int."""
    p = make_problem((8,))
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1])
    expected = with_gradients(fused, name, p._replace(mask=keep.double()))
    assert_same(with_gradients(fused, name, p._replace(mask=keep.to(dtype))), expected)


def test_ignored_tokens_equal_their_absence() -> None:
    """−100 must be neither gathered (out of bounds) nor scored as another id."""
    p = make_problem((4,))._replace(mask=None)
    some = p._replace(tokens=torch.tensor([2, -100, 5, -100]))
    fields = ("hidden", "teacher_hidden", "advantages", "sampler_logprobs", "teacher_logprobs")
    two = p._replace(tokens=torch.tensor([2, 5]), **{f: getattr(p, f)[::2] for f in fields})
    for name in REDUCED:
        torch.testing.assert_close(fused(name, some), fused(name, two))
        assert (fused_output(name, some).logprobs[1::2] == 0).all()
