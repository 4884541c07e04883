"""`torch.nn.functional.linear_cross_entropy` as it comes, without chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.implementations import Unsupported


def build(case: Case) -> Callable[[], Tensor]:
    return per_token(case)


def per_token(case: Case, **options: Any) -> Callable[[], Tensor]:
    """The case's loss on `-linear_cross_entropy(..., reduction="none")`, the log-probs of the tokens."""
    linear_cross_entropy = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if linear_cross_entropy is None:
        raise Unsupported(f"torch {torch.__version__} has no linear_cross_entropy")
    if case.op == "reverse_kl":
        raise Unsupported("linear_cross_entropy has no divergence between two heads")

    def loss() -> Tensor:
        nll = linear_cross_entropy(case.hidden, case.weight, case.tokens, reduction="none", **options)
        return case.objective(-nll.float())

    return loss
