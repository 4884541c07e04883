"""Is the sampled gradient unbiased? The mean over many seeds must approach the exact one at the Monte-Carlo rate.

For independent g_1 … g_S with mean g, E ‖ḡ − g‖² = E ‖g_1 − g‖² / S. The ratio of the two sides is near 1 for an unbiased
estimator and near S · bias² / variance for another. Seeds are fixed: the tests cannot fail by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import TRAINABLE, Problem, fused
from sampled_cases import peaked_problem, use_small_blocks, with_flat_rows
from torch import Tensor

from fastkl import loss
from fastkl.kernels import sampled_probabilities, sampled_torch

SEEDS = 250
Loss = Callable[..., Tensor]


def divergence(function: Callable[..., loss.LossOutput], **options: Any) -> Loss:
    def evaluate(p: Problem, **how: Any) -> Tensor:
        how = {"bias": p.bias, "teacher_bias": p.teacher_bias, "tokens": p.tokens, **options, **how}
        return function(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, **how).loss

    return evaluate


def top_k(**options: Any) -> Loss:
    def evaluate(p: Problem, **how: Any) -> Tensor:
        z = torch.nn.functional.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
        listed, ids = torch.log_softmax(z, -1).topk(5)
        return loss.top_k_kl_loss(p.hidden, p.weight, ids, listed, bias=p.bias, **options, **how).loss

    return evaluate


def named(name: str, **options: Any) -> Loss:
    return lambda p, **how: fused(name, p, **options, **how)


LOSSES: dict[str, Loss] = {
    "linear_logprobs": named("linear_logprobs"),
    "policy_gradient": named("policy_gradient"),
    "policy_gradient-ppo": named("policy_gradient", method="ppo"),
    "policy_gradient-none": named("policy_gradient", reduction="none"),
    "policy_gradient-entropy": named("policy_gradient", entropy_coef=0.3),
    "policy_gradient-entropy-none": named("policy_gradient", entropy_coef=0.3, reduction="none"),
    "sampled_reverse_kl": named("sampled_reverse_kl", discount=0.5),
    "reverse_kl": divergence(loss.reverse_kl_loss),
    "reverse_kl-none": divergence(loss.reverse_kl_loss, reduction="none"),
    "forward_kl": divergence(loss.forward_kl_loss),
    "forward_kl-none": divergence(loss.forward_kl_loss, reduction="none"),
    "jsd": divergence(loss.jsd_loss, beta=0.3),
    "jsd-none": divergence(loss.jsd_loss, beta=0.3, reduction="none"),
    "skewed_forward_kl": divergence(loss.skewed_forward_kl_loss),
    "skewed_forward_kl-none": divergence(loss.skewed_forward_kl_loss, reduction="none"),
    "skewed_reverse_kl": divergence(loss.skewed_reverse_kl_loss),
    "skewed_reverse_kl-none": divergence(loss.skewed_reverse_kl_loss, reduction="none"),
    "total_variation": divergence(loss.total_variation_loss),
    "total_variation-none": divergence(loss.total_variation_loss, reduction="none"),
    "top_k": top_k(),
    "top_k-none": top_k(reduction="none"),
    "top_k-forward-drop": top_k(direction="forward", tail="drop"),
}
SOFTCAP: dict[str, Any] = {"softcap": 9.0, "temperature": 0.8}


@pytest.fixture(autouse=True)
def always_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(sampled_probabilities, "BREAK_EVEN", 2.0)


def gradients(evaluate: Loss, p: Problem, needs: tuple[str, ...], **options: Any) -> list[Tensor]:
    p = p.leaves(needs)
    value = evaluate(p, **options)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape) if value.dim() else None
    return list(torch.autograd.grad(value, [getattr(p, field) for field in needs], upstream))


def bias_over_noise(
    evaluate: Loss, needs: tuple[str, ...], problem: Problem | None = None, seeds: int = SEEDS, **options: Any
) -> list[float]:
    """‖ḡ − g‖² S / mean ‖g_s − g‖² for each gradient that is sampled, about 1 without a bias."""
    p = peaked_problem(32, vocabulary=500) if problem is None else problem
    exact = gradients(evaluate, p, needs, **options)
    draws = [
        gradients(evaluate, p, needs, backward="sampled", seed=seed, grad_error=0.15, **options)
        for seed in range(seeds)
    ]
    found = []
    for field, true, *samples in zip(needs, exact, *draws, strict=True):
        errors = torch.stack(samples) - true
        noise = errors.square().sum() / seeds
        if field == "bias" and noise < 1e-20 * true.square().sum():
            continue  # exact where the loss is reduced
        found.append(float(errors.mean(0).square().sum() * seeds / noise))
    return found


@pytest.mark.parametrize("needs", [("hidden",), TRAINABLE], ids=["frozen-head", "all"])
@pytest.mark.parametrize("evaluate", LOSSES.values(), ids=LOSSES)
def test_unbiased(evaluate: Loss, needs: tuple[str, ...]) -> None:
    ratios = bias_over_noise(evaluate, needs)
    assert len(ratios) >= min(2, len(needs))
    assert max(ratios) < 2.5, ratios


@pytest.mark.parametrize("needs", [("hidden",), TRAINABLE], ids=["frozen-head", "all"])
@pytest.mark.parametrize(
    "name", ["linear_logprobs", "policy_gradient", "policy_gradient-entropy", "reverse_kl", "top_k"]
)
def test_unbiased_under_a_softcap(name: str, needs: tuple[str, ...]) -> None:
    assert max(bias_over_noise(LOSSES[name], needs, **SOFTCAP)) < 2.5


@pytest.mark.parametrize("needs", [("hidden",), TRAINABLE], ids=["frozen-head", "all"])
@pytest.mark.parametrize("name", ["linear_logprobs", "policy_gradient"])
def test_unbiased_among_flat_blocks(monkeypatch: pytest.MonkeyPatch, name: str, needs: tuple[str, ...]) -> None:
    """Which blocks are exact does not depend on what is drawn in others."""
    monkeypatch.setattr(sampled_probabilities, "BREAK_EVEN", 0.5)
    p = with_flat_rows(peaked_problem(80, vocabulary=500), slice(16, 48))
    assert max(bias_over_noise(LOSSES[name], needs, p)) < 2.5


@pytest.mark.parametrize("evaluate", LOSSES.values(), ids=LOSSES)
def test_the_test_finds_a_bias(monkeypatch: pytest.MonkeyPatch, evaluate: Loss) -> None:
    """Columns kept at random without the weights 1 / π: the tail is lost, as under a filter."""

    def unweighted(self: sampled_torch.Sampler, gradient: Tensor, columns: sampled_torch.Columns) -> Tensor:
        return gradient.index_select(1, columns.ids)

    monkeypatch.setattr(sampled_torch.Sampler, "estimate", unweighted)
    assert min(bias_over_noise(evaluate, TRAINABLE, seeds=60)) > 5
