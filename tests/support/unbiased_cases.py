"""The losses by name, and how far the mean of their sampled gradients is from the exact ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from loss_cases import Problem, fused
from sparse_cases import peaked_problem
from torch import Tensor

from fastkl import loss
from fastkl.loss import Sparse

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
    draws = [gradients(evaluate, p, needs, backward=Sparse(seed, error=0.15), **options) for seed in range(seeds)]
    found = []
    for field, true, *samples in zip(needs, exact, *draws, strict=True):
        errors = torch.stack(samples) - true
        noise = errors.square().sum() / seeds
        if field == "bias" and noise < 1e-20 * true.square().sum():
            continue  # exact where the loss is reduced
        found.append(float(errors.mean(0).square().sum() * seeds / noise))
    return found
