"""fastkl with the sparse backward (docs/sparse-backward.md): unbiased gradients, another sample in every call."""

from __future__ import annotations

import itertools
from typing import Any

from bench.lib.cases import BETAS, ENTROPY_COEF, Case
from bench.peers import Loss, Peer
from fastkl.loss import Sparse, jsd_loss, linear_logprobs, policy_gradient_loss, top_k_kl_loss


def build(case: Case) -> Loss:
    seeds = itertools.count()
    head = case.hidden, case.weight

    def sparse() -> dict[str, Any]:
        return {"backward": Sparse(next(seeds))}

    if case.op == "logprobs":
        return lambda: case.objective(linear_logprobs(*head, case.tokens, **sparse()))
    if case.op == "top_k":
        return lambda: top_k_kl_loss(*head, *case.teacher_list, **sparse()).loss
    if case.op in BETAS:
        return lambda: jsd_loss(*head, *case.teacher, beta=BETAS[case.op], **sparse()).loss
    terms = case.tokens, case.advantages, case.sampler_logprobs
    coef = ENTROPY_COEF if case.op == "entropy" else 0.0
    return lambda: policy_gradient_loss(*head, *terms, entropy_coef=coef, **sparse()).loss


PEER = Peer(build, backward="sparse")
