"""QuACK's cross entropy per token on all logits at once, which backward overwrites with their gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.lib.cases import OF_LOGPROBS, Case
from bench.peers import Loss, Peer
from bench.peers.packages.quack import check_alignment


def build(case: Case) -> Loss:
    check_alignment(case)
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def loss() -> Tensor:
        nll = linear_cross_entropy_func(
            case.hidden, case.weight, None, case.tokens, reduction="none", inplace_backward=True
        )
        return case.objective(-nll)

    return loss


PEER = Peer(
    build,
    ops=OF_LOGPROBS,
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    packages=("quack-kernels", "nvidia-cutlass-dsl"),
)
