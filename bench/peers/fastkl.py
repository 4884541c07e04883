"""fastkl as a user calls it: the policy gradient with its advantages inside the operator."""

from __future__ import annotations

from bench.lib.cases import BETAS, ENTROPY_COEF, Case
from bench.peers import Loss, Peer, fastkl_composed
from fastkl.loss import jsd_loss, policy_gradient_loss, top_k_kl_loss


def build(case: Case) -> Loss:
    if case.op == "logprobs":
        return fastkl_composed.build(case)
    head = case.hidden, case.weight
    if case.op == "top_k":
        return lambda: top_k_kl_loss(*head, *case.teacher_list).loss
    if case.op in BETAS:
        return lambda: jsd_loss(*head, *case.teacher, beta=BETAS[case.op]).loss
    terms = case.tokens, case.advantages, case.sampler_logprobs
    coef = ENTROPY_COEF if case.op == "entropy" else 0.0
    return lambda: policy_gradient_loss(*head, *terms, entropy_coef=coef).loss


PEER = Peer(build)
