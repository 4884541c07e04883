"""Log-probs that do not depend on their tokens: those of a model that was put to sleep, or of none."""

from __future__ import annotations

from collections.abc import Sequence

FLAT = 0.01  # nats: log-probs of different tokens in different places are never this close, unless all are near 0
CERTAIN = -0.1  # nats: a text that the model knows by heart has log-probs above this
MANY = 16  # tokens whose log-probs cannot be alike by chance


def alike(logprobs: Sequence[float]) -> bool:
    """All are the same but for rounding; there must be one."""
    return max(logprobs) - min(logprobs) <= FLAT


def meaningless(tokens: Sequence[int], logprobs: Sequence[float]) -> bool:
    """So many tokens, not all the same one, have one log-prob that no model says so."""
    many = len(tokens) >= MANY and len(set(tokens)) > 1
    return many and alike(logprobs) and max(logprobs) < CERTAIN
