"""TRL's kernel for log-probs and entropy in one pass over all logits (`trl.kernels.logprob_entropy`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.lib.cases import ENTROPY_COEF, OF_LOGPROBS, Case
from bench.peers import Loss, Peer


def build(case: Case) -> Loss:
    from trl.kernels import selective_log_softmax_and_entropy

    def loss() -> Tensor:
        logits = torch.nn.functional.linear(case.hidden, case.weight)
        logprobs, entropy = selective_log_softmax_and_entropy(logits, case.tokens)
        value = case.objective(logprobs)
        return value - ENTROPY_COEF * entropy.mean() if case.op == "entropy" else value

    return loss


NOTE = "holds all logits, in the inputs' dtype; always gives the entropy"
OPS = (*OF_LOGPROBS, "entropy")
PEER = Peer(build, ops=OPS, devices=("cuda",), packages=("trl",), notes=dict.fromkeys(OPS, NOTE))
