"""Liger Kernel's Triton losses, for the ops where `liger` is the PyTorch one too.

logprobs, policy_gradient    LigerFusedLinearCrossEntropyLoss(reduction="none"): forms the logits again in backward
reverse_kl                   LigerFusedLinearJSD, beta = 1
"""

from __future__ import annotations

from bench.cases import Case
from bench.peers import Loss, Peer, Unsupported


def build(case: Case) -> Loss:
    if case.hidden.device.type == "cpu":
        raise Unsupported("its Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    if case.op == "reverse_kl":
        jsd = LigerFusedLinearJSD(jsd_beta=1.0)
        return lambda: jsd(case.hidden, case.weight, *case.teacher, None)
    nll = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda: case.objective(-nll(case.weight, case.hidden, case.tokens))


_DW = "accumulates the weight's gradient in the weight's dtype (its default)"
PEER = Peer(
    build,
    packages=("liger-kernel",),
    notes={
        "logprobs": _DW,
        "policy_gradient": _DW,
        "reverse_kl": f"its forward pass always forms the gradients too; {_DW}",
    },
)
