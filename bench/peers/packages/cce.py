"""Cut Cross-Entropy as it comes: tiles of the gradient by the logits in which all is below a threshold are left out."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bench.lib.cases import OF_LOGPROBS, Case
from bench.peers import Loss, Peer


def build(case: Case) -> Loss:
    return per_token(case)


def per_token(case: Case, **options: Any) -> Loss:
    """The case's loss on `-linear_cross_entropy(..., reduction="none")`, the log-probs of the tokens."""
    from cut_cross_entropy import linear_cross_entropy

    nll = functools.partial(linear_cross_entropy, reduction="none", **options)
    return lambda: case.objective(-nll(case.hidden, case.weight, case.tokens))


# Of version 25.1.1, by its source. Its backward kernel refuses float32.
NOTE = "forms the logits again in backward; accumulates both gradients in bf16 under locks, in no fixed order"
PEER = Peer(
    build,
    ops=OF_LOGPROBS,
    devices=("cuda",),
    dtypes=(torch.bfloat16,),
    packages=("cut-cross-entropy",),
    backward="filtered: tiles with |p - 1[y]| < eps(dtype) / 32 throughout are left out",
    notes=dict.fromkeys(OF_LOGPROBS, NOTE),
)
