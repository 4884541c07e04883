"""`torch.nn.functional.linear_cross_entropy` with its chunks (`LinearCrossEntropyOptions()`): logits again in backward."""

from __future__ import annotations

import torch

from bench.lib.cases import OF_LOGPROBS, Case
from bench.peers import Loss, Peer, Unsupported
from bench.peers.torch_lce import per_token


def build(case: Case) -> Loss:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unsupported(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    return per_token(case, options=options())


PEER = Peer(build, ops=OF_LOGPROBS)
