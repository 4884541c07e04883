"""`torch.nn.functional.linear_cross_entropy` as it comes, without chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.lib.cases import OF_LOGPROBS, Case
from bench.peers import Loss, Peer, Unsupported


def build(case: Case) -> Loss:
    return per_token(case)


def per_token(case: Case, **options: Any) -> Loss:
    """The case's loss on `-linear_cross_entropy(..., reduction="none")`, the log-probs of the tokens."""
    linear_cross_entropy = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        raise Unsupported(f"torch {torch.__version__} has no linear_cross_entropy")

    def loss() -> Tensor:
        nll = linear_cross_entropy(case.hidden, case.weight, case.tokens, reduction="none", **options)
        return case.objective(-nll.float())

    return loss


PEER = Peer(build, ops=OF_LOGPROBS)
