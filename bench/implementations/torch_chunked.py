"""`torch.nn.functional.linear_cross_entropy` with its chunks (`LinearCrossEntropyOptions()`): logits again in backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.implementations import Unsupported
from bench.implementations.torch_linear import per_token


def build(case: Case) -> Callable[[], Tensor]:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unsupported(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    return per_token(case, options=options())
