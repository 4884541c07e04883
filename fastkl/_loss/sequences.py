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
        self._starts = starts
        numbers = starts.reshape(-1).cumsum(0)  # [N], which sequence a token is of
        self._numbers = numbers.reshape(starts.shape)
        self._first = torch.searchsorted(numbers, numbers)  # [N], the first token of its sequence

    def sum(self, values: Tensor) -> Tensor:
        """For values [N], each token's sum over its sequence [N]; in float64, and always in the same order."""
        totals = future_sums(values.double().reshape(self._numbers.shape), 1.0, self._numbers)
        return totals.reshape(-1)[self._first].to(values.dtype)

    def sum_of_others(self, values: Tensor) -> Tensor:
        """For values [N], each token's sum over all sequences but its own [N], in float64, without a difference."""
        end = torch.searchsorted(self._numbers.reshape(-1), self._numbers.reshape(-1), right=True)
        zero = values.new_zeros(1, dtype=torch.float64)
        later = torch.cat([future_sums(values.double(), 1.0, None), zero])[end]
        earlier = torch.cat([future_sums(values.double().flip(0), 1.0, None), zero]).flip(0)[self._first]
        return earlier + later

    def mean(self, values: Tensor, active: Tensor) -> Tensor:
        """For values [N], each token's mean over the active tokens of its sequence [N]; 0 if there are none."""
        return self.sum(values.where(active, 0.0)) / self.sum(active.to(values.dtype)).clamp(min=1.0)

    def count(self, active: Tensor) -> Tensor:
        """How many sequences have an active token, 0-dim; no synchronisation."""
        return ((self.sum(active.double()) > 0) & self._starts.reshape(-1)).sum()


def future_sums(values: Tensor, discount: float, sequence_ids: Tensor | None) -> Tensor:
    """y_i = Σ_k discountᵏ x_{i+k} along the last dimension, within a sequence: equal ids stand together.

    By doubling: log₂ T steps, no division by powers of the discount, and an order of the sums that does not vary.
    """
    total, shift = values.clone(), 1
    while shift < values.shape[-1]:
        later = total[..., shift:] * discount**shift
        if sequence_ids is not None:
            later = later.where(sequence_ids[..., shift:] == sequence_ids[..., :-shift], 0.0)
        total = torch.cat([total[..., :-shift] + later, total[..., -shift:]], dim=-1)
        shift *= 2
    return total
