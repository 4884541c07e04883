"""Eager PyTorch: all logits at once, gradients by autograd; softmax in float32 as trainers do (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.lib.cases import BETAS, ENTROPY_COEF, Case
from bench.peers import Loss, Peer
from fastkl import reference


def build(case: Case) -> Loss:
    return lambda: loss(case)


def loss(case: Case) -> Tensor:
    """The scalar loss of a case, as `fastkl.reference` writes it."""
    z = _logits(case.hidden, case.weight)
    if case.op == "top_k":
        return reference.top_k_kl(z, *case.teacher_list).mean()
    if case.op in BETAS:
        return _divergence(case, z)
    value = case.objective(reference.logprobs(z, case.tokens))
    return value - ENTROPY_COEF * reference.entropy(z).mean() if case.op == "entropy" else value


def _divergence(case: Case, z: Tensor) -> Tensor:
    teacher_hidden, teacher_weight = case.teacher
    with torch.no_grad():
        teacher = _logits(teacher_hidden, teacher_weight)
    options = {"beta": BETAS["jsd"]} if case.op == "jsd" else {}
    per_token: Tensor = getattr(reference, case.op)(z, teacher, **options)
    return per_token.mean()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """No temperature, no cap: `reference.logits` would pass over [N, V] twice for factors of 1."""
    z = torch.nn.functional.linear(hidden, weight)
    return z if z.dtype == torch.float64 else z.float()


PEER = Peer(build)
