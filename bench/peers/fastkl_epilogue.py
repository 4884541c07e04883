"""fastkl without logits in memory: the row pass is in the epilogue of their product (`kernels/epilogue/triton.py`)."""

from __future__ import annotations

import torch

from bench.lib.cases import Case
from bench.peers import Loss, Peer
from fastkl.loss import policy_gradient_loss


def build(case: Case) -> Loss:
    terms = case.hidden, case.weight, case.tokens, case.advantages, case.sampler_logprobs
    return lambda: policy_gradient_loss(*terms, backend="epilogue").loss


PEER = Peer(build, ops=("policy_gradient",), devices=("cuda",), dtypes=(torch.bfloat16,))
