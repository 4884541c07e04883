"""Code written by others as the oracle: torch.nn.functional, and Liger-Kernel's chunked losses, which run on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import Problem, fused, generator, make_problem
from torch import Tensor

FIELDS = ("hidden", "weight", "bias")


def results(value: Tensor, p: Problem) -> tuple[Tensor, ...]:
    return value.detach(), *torch.autograd.grad(value, [getattr(p, f) for f in FIELDS])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_cross_entropy(temperature: float, reduction: str) -> None:
    p = make_problem((2, 9)).leaves()
    weights = torch.linspace(0.5, 2, 18, dtype=torch.float64).reshape(2, 9)
    nll = -fused("linear_logprobs", p, temperature=temperature)
    z = F.linear(p.hidden, p.weight, p.bias) / temperature
    oracle = F.cross_entropy(z.flatten(0, 1), p.tokens.flatten(), reduction=reduction, ignore_index=-100)
    if reduction == "mean":
        ours = nll.sum() / (p.tokens != -100).sum()
    else:
        ours, oracle = (nll * weights).sum(), (oracle.reshape(2, 9) * weights).sum()
    torch.testing.assert_close(results(ours, p), results(oracle, p))


def test_reinforce_of_advantage_one_is_cross_entropy() -> None:
    p = make_problem((18,))._replace(mask=None, sampler_logprobs=None, advantages=torch.ones(18)).leaves()
    oracle = F.cross_entropy(F.linear(p.hidden, p.weight, p.bias), p.tokens)
    torch.testing.assert_close(results(fused("policy_gradient", p, method="reinforce"), p), results(oracle, p))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_div(temperature: float) -> None:
    """F.kl_div(log q, log p) is KL(p ‖ q): the student is its target."""
    p = make_problem((2, 9))
    p = p._replace(mask=None, tokens=p.tokens.clamp(min=0)).leaves()
    log_p = (F.linear(p.hidden, p.weight, p.bias) / temperature).log_softmax(-1)
    log_q = (F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias) / temperature).log_softmax(-1)
    oracle = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 18
    torch.testing.assert_close(results(fused("reverse_kl", p, temperature=temperature), p), results(oracle, p))


@pytest.mark.parametrize("method", ["ppo", "cispo"])
def test_liger_grpo(method: Any) -> None:
    """Liger's "dapo" is PPO's clip averaged over all tokens; its CISPO takes the upper bound itself and has no lower."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    p = make_problem((3, 8), dtype=torch.float64)
    p = p._replace(tokens=p.tokens.clamp(min=0), mask=(torch.rand(3, 8, generator=generator(1)) < 0.8).double())
    per_sequence = torch.tensor([1.3, -0.7, 0.4], dtype=torch.float64)
    p = p._replace(advantages=per_sequence[:, None].expand(3, 8)).leaves()
    clips = {"clip_low": 0.1, "clip_high": 0.3} if method == "ppo" else {"clip_low": 1.0, "clip_high": 0.3}
    ours = fused("policy_gradient", p, method=method, temperature=0.9, **clips)
    loss_type, high = ("dapo", 0.3) if method == "ppo" else ("cispo", 1.3)
    module = liger.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        epsilon_low=0.1,
        epsilon_high=high,
        loss_type=loss_type,
        temperature=0.9,
    )
    oracle, _ = module(
        p.hidden, p.weight, p.tokens, p.mask, per_sequence, p.bias, old_per_token_logps=p.sampler_logprobs
    )
    # Liger computes log-probs in float32.
    for mine, theirs in zip(results(ours, p), results(oracle, p), strict=True):
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-4, atol=1e-6)


def test_liger_jsd() -> None:
    """Its β = 1 is the reverse KL; "ignored" rows are left out of sum and count."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    p = make_problem((18,), dtype=torch.float32)._replace(mask=None).leaves()
    assert (p.tokens == -100).any()
    module = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, temperature=0.8, compiled=False
    )
    oracle = module(
        p.hidden,
        p.weight,
        p.teacher_hidden,
        p.teacher_weight,
        p.tokens,
        student_bias=p.bias,
        teacher_bias=p.teacher_bias,
    )
    for mine, theirs in zip(results(fused("reverse_kl", p, temperature=0.8), p), results(oracle, p), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
