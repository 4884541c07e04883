"""Liger Kernel's Triton losses, for the ops where `liger` is the PyTorch one too.

logprobs, policy_gradient    LigerFusedLinearCrossEntropyLoss(reduction="none"): forms the logits again in backward
divergences                  LigerFusedLinearJSD
"""

from __future__ import annotations

from bench.lib.cases import BETAS, Case
from bench.peers import Loss, Peer, Unsupported


def build(case: Case) -> Loss:
    if case.hidden.device.type == "cpu":
        raise Unsupported("its Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    if case.op in BETAS:
        jsd = LigerFusedLinearJSD(jsd_beta=BETAS[case.op])
        return lambda: jsd(case.hidden, case.weight, *case.teacher, None)
    nll = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda: case.objective(-nll(case.weight, case.hidden, case.tokens))


_DW = "accumulates the weight's gradient in the weight's dtype (its default)"
PEER = Peer(
    build,
    ops=("logprobs", "policy_gradient", *BETAS),
    packages=("liger-kernel",),
    notes={
        "logprobs": _DW,
        "policy_gradient": _DW,
        **dict.fromkeys(BETAS, f"its forward pass always forms the gradients too; {_DW}"),
    },
)
