"""`torch.compile` of the eager loss."""

from __future__ import annotations

import torch

from bench.lib.cases import Case
from bench.peers import Loss, Peer, Unsupported, eager


def build(case: Case) -> Loss:
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.zeros(2, device=case.hidden.device))
    except Exception as error:  # inductor raises a type of its own for each thing that may be missing
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Unsupported(f"torch.compile does not work here: {reason}") from error
    compiled = torch.compile(eager.loss)
    return lambda: compiled(case)


PEER = Peer(build)
