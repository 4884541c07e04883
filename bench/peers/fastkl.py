"""fastkl as a user calls it: the policy gradient with its advantages inside the operator."""

from __future__ import annotations

from bench.cases import Case
from bench.peers import Loss, Peer, fastkl_composed
from fastkl.loss import policy_gradient_loss, reverse_kl_loss


def build(case: Case) -> Loss:
    if case.op == "logprobs":
        return fastkl_composed.build(case)
    if case.op == "policy_gradient":
        return lambda: (
            policy_gradient_loss(case.hidden, case.weight, case.tokens, case.advantages, case.sampler_logprobs).loss
        )
    teacher_hidden, teacher_weight = case.teacher
    return lambda: reverse_kl_loss(case.hidden, case.weight, teacher_hidden, teacher_weight).loss


PEER = Peer(build)
