"""TRL: the loss of its DistillationTrainer, a chunked divergence on hidden states."""

from __future__ import annotations

import torch

from bench.lib.cases import BETAS, Case
from bench.peers import Loss, Peer


def build(case: Case) -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    teacher_hidden, teacher_weight = case.teacher
    mask = torch.ones(1, case.hidden.shape[0], device=case.hidden.device)
    heads = case.hidden[None], teacher_hidden[None], case.weight, teacher_weight
    return lambda: _chunked_divergence_loss(*heads, mask, BETAS[case.op])[0]


PEER = Peer(build, ops=tuple(BETAS), packages=("trl",), notes=dict.fromkeys(BETAS, "the student's entropy besides"))
