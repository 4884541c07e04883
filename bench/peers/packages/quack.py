"""QuACK's chunked linear cross entropy. It has a mean and a sum but no weights per token, so its advantages are all 1."""

from __future__ import annotations

import dataclasses

import torch

from bench.lib.cases import Case
from bench.peers import Loss, Peer, Unsupported

ALIGNMENT = 8  # of N, D and V


def build(case: Case) -> Loss:
    check_alignment(case)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: chunked_linear_cross_entropy(case.hidden, case.weight, case.tokens)


def check_alignment(case: Case) -> None:
    shape = *case.hidden.shape, case.weight.shape[0]
    if any(size % ALIGNMENT for size in shape):
        raise Unsupported(f"N,D,V = {','.join(map(str, shape))}; it needs multiples of {ALIGNMENT}")


def _unweighted(case: Case) -> Case:
    return dataclasses.replace(case, advantages=torch.ones_like(case.advantages))


PEER = Peer(
    build,
    ops=("logprobs", "cross_entropy"),
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    packages=("quack-kernels", "nvidia-cutlass-dsl"),
    notes={"logprobs": "another loss: plain mean cross entropy, every advantage 1; its error is against that"},
    solves=_unweighted,
)
