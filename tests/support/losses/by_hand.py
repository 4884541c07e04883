"""Objectives from all the log-probs [n, V] of a student p and a teacher q; [n] each."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def listed(log_p: Tensor, log_q: Tensor, k: int, of: str = "teacher") -> Tensor:
    """bool [n, V]: the k likeliest tokens of the teacher, of the student, or of both."""
    chosen = torch.zeros(log_p.shape, dtype=torch.bool)
    for name, logprobs in (("student", log_p), ("teacher", log_q)):
        if of in (name, "both"):
            chosen.scatter_(-1, logprobs.detach().topk(k, -1).indices, True)
    return chosen


def rest(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """The probability of all tokens that are not listed."""
    return logprobs.exp().masked_fill(chosen, 0.0).sum(-1)


def bucket(log_p: Tensor, log_q: Tensor, chosen: Tensor) -> Tensor:
    """KL(p ‖ q) of the listed tokens and all others as one outcome."""
    rest_p, rest_q = rest(log_p, chosen), rest(log_q, chosen)
    inside = (log_p.exp() * (log_p - log_q)).masked_fill(~chosen, 0.0).sum(-1)
    return inside + rest_p * (rest_p / rest_q).log()
