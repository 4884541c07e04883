"""A loss of the user's own on `linear_logprobs`: with a trainable head the logits are formed twice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.cases import Case
from bench.implementations import Unsupported
from fastkl.loss import linear_logprobs


def build(case: Case) -> Callable[[], Tensor]:
    if case.op == "reverse_kl":
        raise Unsupported("the reverse KL over the vocabulary is no function of the tokens' log-probs")
    return lambda: case.objective(linear_logprobs(case.hidden, case.weight, case.tokens))
