"""`fastkl.integrations.liger`: the classes of Liger Kernel, called as `packages/liger.py` calls those."""

from __future__ import annotations

from bench.lib.cases import BETAS, Case
from bench.peers import Loss, Peer
from bench.peers.packages.liger import GRPO, build_chunked
from fastkl.integrations import liger


def build(case: Case) -> Loss:
    if case.op == "cross_entropy":
        mean = liger.LigerFusedLinearCrossEntropyLoss()
        return lambda: mean(case.weight, case.hidden, case.tokens)
    return build_chunked(case, liger, compiled=False)


PEER = Peer(build, ops=("cross_entropy", *GRPO, *BETAS))
