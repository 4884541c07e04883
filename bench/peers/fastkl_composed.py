"""A loss of the user's own on `linear_logprobs`: with a trainable head the logits are formed twice.

Not for reverse_kl: a divergence over the vocabulary is no function of the tokens' log-probs.
"""

from __future__ import annotations

from bench.lib.cases import OF_LOGPROBS, Case
from bench.peers import Loss, Peer
from fastkl.loss import linear_logprobs


def build(case: Case) -> Loss:
    return lambda: case.objective(linear_logprobs(case.hidden, case.weight, case.tokens))


PEER = Peer(build, ops=OF_LOGPROBS)
