"""Cut Cross-Entropy without its filter: every tile of the gradient is computed."""

from __future__ import annotations

import dataclasses

from bench.lib.cases import Case
from bench.peers import Loss
from bench.peers.packages import cce


def build(case: Case) -> Loss:
    return cce.per_token(case, filter_eps=None)


PEER = dataclasses.replace(cce.PEER, build=build, backward="exact")
