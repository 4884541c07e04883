"""Drop-in replacement of the divergences of Liger-Kernel and TRL, where they are right; where they are not is stated.

TRL is not among the packages of the tests: with `trl` and `datasets` installed its tests run too.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from loss_cases import Problem, make_problem
from torch import Tensor

from fastkl import reference
from fastkl.loss import jsd_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
FIELDS = ("hidden", "weight", "bias")


def ours(p: Problem, **options: Any) -> Tensor:
    teacher = {"teacher_hidden": p.teacher_hidden, "teacher_weight": p.teacher_weight, "teacher_bias": p.teacher_bias}
    return jsd_loss(p.hidden, p.weight, tokens=p.tokens, bias=p.bias, **teacher, **options).loss


def liger(p: Problem, beta: float, temperature: float = 1.0) -> Tensor:
    losses = pytest.importorskip("liger_kernel.chunked_loss")
    module = losses.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False
    )
    heads = p.hidden, p.weight, p.teacher_hidden, p.teacher_weight
    value: Tensor = module(*heads, p.tokens, student_bias=p.bias, teacher_bias=p.teacher_bias)
    return value


def trl() -> ModuleType:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    trainer: ModuleType = pytest.importorskip("trl.trainer.distillation_trainer")
    return trainer


def assert_same(mine: Tensor, theirs: Tensor, p: Problem) -> None:
    tensors = [getattr(p, field) for field in FIELDS]
    found = [(value, *torch.autograd.grad(value, tensors)) for value in (mine, theirs)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("beta", BETAS)
def test_liger(beta: float, temperature: float) -> None:
    """The same β, rows with an ignored token left out of sum and count, temperature on both sides and no T²."""
    p = make_problem((18,), dtype=torch.float32).leaves()
    assert (p.tokens == -100).any()
    assert_same(ours(p, beta=beta, temperature=temperature), liger(p, beta, temperature), p)


@pytest.mark.parametrize("beta", BETAS)
def test_liger_gives_the_student_tokens_that_it_has_not(beta: float) -> None:
    """A head of 11 ids beside one padded to 13: Liger fills the student up with logits of 0, which take probability.

    vocab_size leaves the padding out on both sides, which is the divergence on the ids that exist.
    """
    p, wide = make_problem((18,), dtype=torch.float32), make_problem((18,), vocabulary=13, dtype=torch.float32)
    p = p._replace(teacher_weight=wide.teacher_weight, teacher_bias=wide.teacher_bias)
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    z = reference.logits(p.hidden, p.weight, p.bias)
    z_teacher = reference.logits(p.teacher_hidden, p.teacher_weight, p.teacher_bias)
    options = {"beta": beta} if name == "jsd" else {}
    counted = (p.tokens != -100).float()
    divergence = getattr(reference, name)
    exact = reference.reduce(divergence(z, z_teacher[..., :11], **options), counted)
    torch.testing.assert_close(ours(p, beta=beta, vocab_size=11), exact, rtol=1e-5, atol=1e-6)
    phantom = torch.nn.functional.pad(z, (0, 2))
    filled = reference.reduce(divergence(phantom, z_teacher, **options), counted)
    torch.testing.assert_close(liger(p, beta), filled, rtol=1e-4, atol=1e-6)
    assert abs(float(filled - exact)) > 0.02 * float(exact)


def test_a_token_that_neither_can_emit() -> None:
    """A bias of −inf on both sides: the limit is a term of 0, where Liger has −inf − (−inf), NaN."""
    p = make_problem((6,), dtype=torch.float32)
    forbid = torch.tensor([2, 7])
    p = p._replace(
        bias=p.bias.index_fill(0, forbid, -math.inf),
        teacher_bias=p.teacher_bias.index_fill(0, forbid, -math.inf),
        tokens=torch.tensor([0, 1, 3, 4, 5, 6]),
    ).leaves()
    kept = [i for i in range(11) if i not in forbid]
    cut = p._replace(**{f: getattr(p, f)[kept] for f in ("weight", "bias", "teacher_weight", "teacher_bias")})
    value = ours(p, beta=0.5)
    torch.testing.assert_close(value, ours(cut._replace(tokens=torch.zeros(6, dtype=torch.int64)), beta=0.5))
    value.backward()
    assert p.hidden.grad.isfinite().all()
    assert p.weight.grad.isfinite().all()
    assert liger(p, 0.5).isnan()


@pytest.mark.parametrize("head", [{}, {"temperature": 0.7, "logit_scale": 1.6, "softcap": 2.5}], ids=["plain", "all"])
@pytest.mark.parametrize("beta", BETAS)
def test_trl(beta: float, head: dict[str, float]) -> None:
    """The loss of its DistillationTrainer: the same β, scale, soft-cap and temperature, mean over the mask."""
    trainer = trl()
    p = make_problem((2, 9), dtype=torch.float32)._replace(tokens=torch.zeros(2, 9, dtype=torch.int64)).leaves()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 1, 1, 1]])
    theirs = {
        "temperature": head.get("temperature", 1.0),
        "student_logit_scale": head.get("logit_scale", 1.0),
        "student_final_logit_softcapping": head.get("softcap"),
    }
    value, entropy, count = trainer._chunked_divergence_loss(
        p.hidden,
        p.teacher_hidden,
        p.weight,
        p.teacher_weight,
        mask,
        beta,
        student_lm_head_bias=p.bias,
        teacher_lm_head_bias=p.teacher_bias,
        **theirs,
    )
    assert_same(ours(p, beta=beta, mask=mask, **head), value, p)
    teacher = {"teacher_hidden": p.teacher_hidden, "teacher_weight": p.teacher_weight, "teacher_bias": p.teacher_bias}
    with torch.no_grad():
        found = jsd_loss(p.hidden, p.weight, bias=p.bias, mask=mask, per_token=True, **teacher, **head).per_token
    assert found is not None
    torch.testing.assert_close(found.student_entropy.sum(), entropy, rtol=1e-4, atol=1e-5)
    assert int(count) == int(mask.sum())
