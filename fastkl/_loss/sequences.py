"""Which tokens make up a sequence, and sums over them."""

from __future__ import annotations

import torch
from torch import Tensor


class Sequences:
    """The sequences of tokens [..., T]: each row along the last dimension is one, or holds several, told apart by ids."""

    def __init__(self, tokens: Tensor, sequence_ids: Tensor | None) -> None:
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[..., :1] = True
        if sequence_ids is not None:
            starts[..., 1:] = sequence_ids[..., 1:] != sequence_ids[..., :-1]
        self._index = starts.reshape(-1).cumsum(0) - 1  # [N], which sequence a token is of

    def sum(self, values: Tensor) -> Tensor:
        """For values [N], each token's sum over its sequence [N]; summed in float64, so that order does not show."""
        totals = torch.zeros_like(values, dtype=torch.float64).index_add_(0, self._index, values.double())
        return totals[self._index].to(values.dtype)

    def mean(self, values: Tensor, active: Tensor) -> Tensor:
        """For values [N], each token's mean over the active tokens of its sequence [N]; 0 if there are none."""
        return self.sum(values.where(active, 0.0)) / self.sum(active.to(values.dtype)).clamp(min=1.0)

    def count(self, active: Tensor) -> Tensor:
        """How many sequences have an active token, 0-dim; no synchronisation."""
        counts = torch.zeros_like(active, dtype=torch.int64).index_add_(0, self._index, active.to(torch.int64))
        return (counts > 0).sum()
