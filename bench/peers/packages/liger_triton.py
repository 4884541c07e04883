"""Liger Kernel's Triton losses, for the ops where `liger` is the PyTorch one too.

log-probs and what is made of them   LigerFusedLinearCrossEntropyLoss(reduction="none"): forms the logits again in backward
cross_entropy                        LigerFusedLinearCrossEntropyLoss()
divergences                          LigerFusedLinearJSD

On a CPU they run in Triton's interpreter (TRITON_INTERPRET=1): the errors are theirs, times and memory say nothing.
"""

from __future__ import annotations

import os

from bench.lib.cases import BETAS, OF_LOGPROBS, Case
from bench.peers import Loss, Peer, Unsupported


def build(case: Case) -> Loss:
    if case.hidden.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("its Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    if case.op in BETAS:
        jsd = LigerFusedLinearJSD(jsd_beta=BETAS[case.op])
        return lambda: jsd(case.hidden, case.weight, *case.teacher, None)
    if case.op == "cross_entropy":
        mean = LigerFusedLinearCrossEntropyLoss()
        return lambda: mean(case.weight, case.hidden, case.tokens)
    nll = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda: case.objective(-nll(case.weight, case.hidden, case.tokens))


IN_ITS_DTYPE = "accumulates the weight's gradient in the weight's dtype (its default)"
PEER = Peer(
    build,
    ops=(*OF_LOGPROBS, *BETAS),
    packages=("liger-kernel",),
    notes={
        **dict.fromkeys(OF_LOGPROBS, IN_ITS_DTYPE),
        **dict.fromkeys(BETAS, f"its forward pass always forms the gradients too; {IN_ITS_DTYPE}"),
    },
)
