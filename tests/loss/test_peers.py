"""Code written by others as the oracle: torch.nn.functional, Liger-Kernel and TRL, where they are right.

Where they are not is stated. TRL needs Python 3.11.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loss_cases import HEADS, fused, fused_output, reference_logits
from problem import TRAINABLE, Problem, make_problem
from torch import Tensor

from fastkl import reference

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def assert_close(ours: Tensor, theirs: Tensor, p: Problem, **near: float) -> None:
    """Value and gradients; of Liger and TRL to the rounding of the float32 that they compute in."""
    tensors = [getattr(p, field) for field in TRAINABLE]
    found = [[t.to(ours.dtype) for t in (v, *torch.autograd.grad(v, tensors))] for v in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1], **near)


FLOAT32 = {"rtol": 1e-4, "atol": 1e-6}


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
    assert_close(ours, oracle, p)


def test_reinforce_of_advantage_one_is_cross_entropy() -> None:
    p = make_problem((18,))._replace(mask=None, sampler_logprobs=None, advantages=torch.ones(18)).leaves()
    oracle = F.cross_entropy(F.linear(p.hidden, p.weight, p.bias), p.tokens)
    assert_close(fused("policy_gradient", p, method="reinforce"), oracle, p)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_div(temperature: float) -> None:
    """F.kl_div(log q, log p) is KL(p ‖ q): the student is its target."""
    p = make_problem((2, 9))
    p = p._replace(mask=None, tokens=p.tokens.clamp(min=0)).leaves()
    log_p = (F.linear(p.hidden, p.weight, p.bias) / temperature).log_softmax(-1)
    log_q = (F.linear(p.teacher_hidden, p.teacher_weight, p.teacher_bias) / temperature).log_softmax(-1)
    oracle = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / 18
    assert_close(fused("reverse_kl", p, temperature=temperature), oracle, p)


def liger_jsd(p: Problem, beta: float, temperature: float = 1.0) -> Tensor:
    liger, options = pytest.importorskip("liger_kernel.chunked_loss"), {"beta": beta, "temperature": temperature}
    module = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=False, **options)
    heads = p.hidden, p.weight, p.teacher_hidden, p.teacher_weight
    value: Tensor = module(*heads, p.tokens, student_bias=p.bias, teacher_bias=p.teacher_bias)
    return value


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("beta", BETAS)
def test_liger_jsd(beta: float, temperature: float) -> None:
    """The same β, rows with an ignored token left out of sum and count, temperature on both sides and no T²."""
    p = make_problem((18,), dtype=torch.float32)._replace(mask=None).leaves()
    assert (p.tokens == -100).any()
    oracle = liger_jsd(p, beta, temperature)
    assert_close(fused("jsd", p, beta=beta, temperature=temperature), oracle, p, **FLOAT32)
    if beta == 1.0:
        assert_close(fused("reverse_kl", p, temperature=temperature), liger_jsd(p, beta, temperature), p, **FLOAT32)


@pytest.mark.parametrize("beta", BETAS)
def test_liger_gives_the_student_tokens_that_it_has_not(beta: float) -> None:
    """A head of 11 ids beside one padded to 13: Liger fills the student up with logits of 0, which take probability.

    vocab_size leaves the padding out on both sides, which is the divergence on the ids that exist.
    """
    p, wide = make_problem((18,), dtype=torch.float32), make_problem((18,), vocabulary=13, dtype=torch.float32)
    p = p._replace(mask=None, teacher_weight=wide.teacher_weight, teacher_bias=wide.teacher_bias)
    z, z_teacher = reference_logits(p)

    def mean(z: Tensor, z_teacher: Tensor) -> Tensor:
        ends = {0.0: reference.forward_kl, 1.0: reference.reverse_kl}
        value = ends[beta](z, z_teacher) if beta in ends else reference.jsd(z, z_teacher, beta)
        return reference.reduce(value, (p.tokens != -100).float())

    exact, filled = mean(z, z_teacher[..., :11]), mean(F.pad(z, (0, 2)), z_teacher)
    torch.testing.assert_close(fused("jsd", p, beta=beta, vocab_size=11), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(liger_jsd(p, beta), filled, **FLOAT32)
    assert abs(float(filled - exact)) > 0.02 * float(exact)


def test_a_token_that_neither_can_emit() -> None:
    """A bias of −inf on both sides: the limit is a term of 0, where Liger has −inf − (−inf), NaN.

    That it is as though the token were not there: test_adversarial.py.
    """
    p, forbid = make_problem((6,), dtype=torch.float32)._replace(mask=None), torch.tensor([2, 7])
    biases = {f: getattr(p, f).index_fill(0, forbid, -math.inf) for f in ("bias", "teacher_bias")}
    p = p._replace(**biases, tokens=torch.tensor([0, 1, 3, 4, 5, 6]))
    assert fused("jsd", p, beta=0.5).isfinite()
    assert liger_jsd(p, 0.5).isnan()


def trl() -> ModuleType:
    pytest.importorskip("trl", minversion="1.16")
    trainer: ModuleType = importlib.import_module("trl.trainer.distillation_trainer")
    return trainer


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["all-chunked"]], ids=["plain", "all"])
@pytest.mark.parametrize("beta", BETAS)
def test_trl(beta: float, head: dict[str, Any]) -> None:
    """The loss of its DistillationTrainer: the same β, scale, soft-cap and temperature, mean over the mask."""
    trainer = trl()
    p = make_problem((2, 9), dtype=torch.float32)._replace(tokens=torch.zeros(2, 9, dtype=torch.int64))
    p = p._replace(mask=torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 1]])).leaves()
    theirs = {
        "temperature": head.get("temperature", 1.0),
        "student_logit_scale": head.get("logit_scale", 1.0),
        "student_final_logit_softcapping": head.get("softcap"),
    }
    inputs = p.hidden, p.teacher_hidden, p.weight, p.teacher_weight, p.mask, beta
    biases = {"student_lm_head_bias": p.bias, "teacher_lm_head_bias": p.teacher_bias}
    value, entropy, count = trainer._chunked_divergence_loss(*inputs, **biases, **theirs)
    assert_close(fused("jsd", p, beta=beta, **head), value, p, **FLOAT32)
    found = fused_output("jsd", p, per_token=True, **head).per_token
    assert found is not None
    torch.testing.assert_close(found.student_entropy.sum(), entropy, rtol=1e-4, atol=1e-5)
    assert int(count) == int(p.mask.sum())
