"""Lists of tokens with a teacher's log-probs, [n, k]: an id of −1 pads, at the end of a list."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from fastkl.loss import TopK
from fastkl.trainer.errors import RunError


def joined(lists: Sequence[TopK]) -> TopK:
    """The entries of the first list, then those of the next that are not there yet, and so on: one width for all places.

    A token that the teacher holds impossible is left out: no loss can weigh the logarithm of nothing.

    Raises:
        RunError: Where nothing is left of a list.
    """
    found = reduce(_union, lists)
    found = packed(found._replace(ids=found.ids.masked_fill(found.logprobs == -torch.inf, -1)))
    if bool((found.ids[:, 0] < 0).any()):
        raise RunError(
            f"the teacher gives none of the {found.ids.shape[1]} tokens of a list any probability. Set loss.top_k_of to "
            f"both, or raise loss.top_k"
        )
    return found


def _union(first: TopK, second: TopK) -> TopK:
    again = (second.ids[:, :, None] == first.ids[:, None, :]).any(-1)
    new = second._replace(ids=second.ids.masked_fill(again, -1))
    return TopK(*(torch.cat(pair, 1) for pair in zip(first, new, strict=True)))


def packed(found: TopK) -> TopK:
    """The same entries in their order, with the padding at the end; its log-probs are 0."""
    order = (found.ids < 0).long().sort(dim=-1, stable=True).indices
    ids = found.ids.gather(-1, order)
    return TopK(ids, found.logprobs.gather(-1, order).where(ids >= 0, 0.0))
