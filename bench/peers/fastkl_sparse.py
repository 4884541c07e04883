"""fastkl with the sparse backward (docs/losses/sparse-backward.md): unbiased gradients, another sample in each call."""

from __future__ import annotations

import itertools

from bench.lib.cases import Case
from bench.peers import Loss, Peer, fastkl
from fastkl.loss import Sparse


def build(case: Case) -> Loss:
    seeds = itertools.count()
    return lambda: fastkl.loss(case, Sparse(next(seeds)))


PEER = Peer(build, backward="sparse")
