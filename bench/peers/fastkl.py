"""fastkl as a user calls it: the policy gradient with its advantages inside the operator."""

from __future__ import annotations

from torch import Tensor

from bench.lib.cases import BETAS, ENTROPY_COEF, SURROGATES, Case
from bench.peers import Loss, Peer
from fastkl.loss import (
    Backward,
    jsd_loss,
    linear_cross_entropy,
    linear_logprobs,
    policy_gradient_loss,
    top_k_kl_loss,
)


def build(case: Case) -> Loss:
    return lambda: loss(case)


def loss(case: Case, backward: Backward = "exact") -> Tensor:
    """The scalar loss of a case."""
    head = case.hidden, case.weight
    if case.op == "logprobs":
        return case.objective(linear_logprobs(*head, case.tokens, backward=backward))
    if case.op == "cross_entropy":
        return linear_cross_entropy(*head, case.tokens, backward=backward).loss
    if case.op == "top_k":
        return top_k_kl_loss(*head, *case.teacher_list, backward=backward).loss
    if case.op in BETAS:
        return jsd_loss(*head, *case.teacher, beta=BETAS[case.op], backward=backward).loss
    terms = case.tokens, case.advantages, case.sampler_logprobs
    options = {"entropy_coef": ENTROPY_COEF if case.op == "entropy" else 0.0, **SURROGATES[case.op]}
    return policy_gradient_loss(*head, *terms, ref_logprobs=case.ref_logprobs, backward=backward, **options).loss


PEER = Peer(build)
