"""Eager PyTorch: all logits at once, gradients by autograd; softmax in float32 as trainers do (float64 for float64)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case
from bench.peers import Loss, Peer
from fastkl import reference


def build(case: Case) -> Loss:
    return lambda: loss(case)


def loss(case: Case) -> Tensor:
    """The scalar loss of a case, as `fastkl.reference` writes it."""
    z = _logits(case.hidden, case.weight)
    if case.op != "reverse_kl":
        return case.objective(reference.logprobs(z, case.tokens))
    teacher_hidden, teacher_weight = case.teacher
    with torch.no_grad():
        teacher = _logits(teacher_hidden, teacher_weight)
    return reference.reverse_kl(z, teacher).mean()


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """No temperature, no cap: `reference.logits` would pass over [N, V] twice for factors of 1."""
    z = torch.nn.functional.linear(hidden, weight)
    return z if z.dtype == torch.float64 else z.float()


PEER = Peer(build)
