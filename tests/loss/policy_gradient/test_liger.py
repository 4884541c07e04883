"""`policy_gradient_loss` as Liger's GRPO loss, loss type by loss type: the tables of docs/losses/names.md, run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problem import Problem, generator, make_problem
from torch import Tensor

from fastkl.loss import LossOutput, policy_gradient_loss

LONGEST = 11
TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo")
NEAR = {"rtol": 1e-4, "atol": 1e-6}


def grpo_problem() -> tuple[Problem, Tensor]:
    """A mask of 0 and 1, and an advantage for each sequence."""
    p = make_problem((3, 8), dtype=torch.float32, seed=1)
    mask = (torch.rand(3, 8, generator=generator(1)) < 0.8).float()
    return p._replace(tokens=p.tokens.clamp(min=0), mask=mask), torch.tensor([1.3, -0.7, 0.4])


def liger(p: Problem, advantages: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    module = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    loss = module(compiled=False, use_ref_model=True, max_completion_length=LONGEST, temperature=0.9, **options)
    inputs = p.hidden, p.weight, p.tokens, p.mask, advantages, p.bias
    value, metrics = loss(*inputs, ref_per_token_logps=p.teacher_logprobs, old_per_token_logps=p.sampler_logprobs)
    return value, list(metrics)


def fastkl(
    p: Problem,
    advantages: Tensor,
    loss_type: str = "dapo",
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    importance_sampling_level: Any = "token",
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
) -> LossOutput:
    assert p.mask is not None
    rows, length = p.tokens.shape
    options: dict[str, Any] = {"method": "ppo", "clip_low": epsilon_low, "clip_high": epsilon_high, "dual_clip": delta}
    if loss_type == "cispo":
        options = {"method": "cispo", "clip_low": 1.0, "clip_high": epsilon_high - 1.0}
    mask = p.mask
    if loss_type == "luspo":
        mask = mask.sum(-1, keepdim=True) * (mask if importance_sampling_level == "sequence" else torch.ones_like(mask))
    reduction: dict[str, Any] = {
        "grpo": {"reduction": "sequence_mean", "normalizer": rows},
        "dr_grpo": {"normalizer": rows * LONGEST},
        "luspo": {"normalizer": rows * length},
    }.get(loss_type, {})
    return policy_gradient_loss(
        p.hidden,
        p.weight,
        p.tokens,
        advantages,
        p.sampler_logprobs,
        bias=p.bias,
        temperature=0.9,
        mask=mask,
        ratio=importance_sampling_level,
        ref_logprobs=p.teacher_logprobs,
        ref_kl_coef=beta,
        ref_kl_ratio=use_bias_correction_kl,
        **options,
        **reduction,
    )


CASES: dict[str, dict[str, Any]] = {
    **{f"{name}-{beta}": {"loss_type": name, "beta": beta} for name in TYPES for beta in (0.0, 0.3)},
    **{f"{name}-bias-correction": {"loss_type": name, "use_bias_correction_kl": True} for name in ("dapo", "cispo")},
    **{f"{name}-sequence": {"loss_type": name, "importance_sampling_level": "sequence"} for name in ("grpo", "bnpo")},
    "sequence-bias-correction": {"importance_sampling_level": "sequence", "use_bias_correction_kl": True},  # the value
    "delta": {"delta": 1.4},
    "delta-bias-correction": {"delta": 1.4, "use_bias_correction_kl": True},
    "cispo-below-1": {"loss_type": "cispo", "epsilon_high": 0.8},
    "cispo-above-1": {"loss_type": "cispo", "epsilon_high": 1.3},
    "wide": {"epsilon_low": 0.1, "epsilon_high": 0.4},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_liger_grpo(on_policy: bool, options: dict[str, Any]) -> None:
    p, advantages = grpo_problem()
    if on_policy:
        p = p._replace(sampler_logprobs=None)
    found = []
    for function in (liger, fastkl):
        q = p.leaves()
        result = function(q, advantages, **options)  # type: ignore[operator]
        result[0].backward()
        found.append((result, q.hidden.grad, q.weight.grad, q.bias.grad))
    (theirs, *gradients), (output, *own) = found
    torch.testing.assert_close(output.loss, theirs[0], **NEAR)
    if set(options) != {"importance_sampling_level", "use_bias_correction_kl"}:  # k differs within a sequence
        torch.testing.assert_close(own, gradients, **NEAR)
    clipped = output.metrics["clip_low_fraction"] + output.metrics["clip_high_fraction"]
    if options.get("loss_type") != "luspo":  # ours would be of the tokens that its weights count
        torch.testing.assert_close(clipped, theirs[1][-1], **NEAR)
        if len(theirs[1]) > 1:
            torch.testing.assert_close(output.metrics["ref_kl"], theirs[1][0], **NEAR)
