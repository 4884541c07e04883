"""What an estimator is off by and how noisy it is, over the rows of a batch: sums, and ratios of them.

The gradient of the head's weight is M = Σ_i g_i ⊗ h_i, with g_i [V] the gradient by the logits of row i and h_i [D] its
hidden state. Each row's token is sampled on its own, so the noise of an estimate of M is Σ_i tr cov(ĝ_i) ‖h_i‖².

A finite batch has scatter of its own: ‖Σ_c M_c‖² over C completions is, in the mean, C(C − 1) ‖E M_c‖² + Σ_c E‖M_c‖².
`Length.of_mean` takes the second term away. It says what stays when a batch grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Length(NamedTuple):
    """Of a sum of the completions' gradients of the head."""

    square: float  # ‖Σ_c M_c‖²
    scatter: float  # Σ_c ‖M_c‖²
    completions: int

    def of_mean(self) -> float | None:
        """‖E M_c‖² without the scatter; None where nothing else is seen."""
        rest = (self.square - self.scatter) / max(self.completions * (self.completions - 1), 1)
        return rest if rest > 0 else None


class Gradient(NamedTuple):
    """What estimators are compared with."""

    rows: float  # Σ_i ‖g_i‖²
    head: Length


class Error(NamedTuple):
    """The bias of an estimator."""

    rows: float  # Σ_i ‖bias_i‖²
    head: Length
    inner: float  # of its head gradient with the exact one

    def scaled(self, factor: float) -> Error:
        square, scatter, completions = self.head
        head = Length(factor**2 * square, factor**2 * scatter, completions)
        return Error(factor**2 * self.rows, head, factor * self.inner)


class Noise(NamedTuple):
    """The variance of an estimator."""

    rows: float  # Σ_i tr cov(ĝ_i)
    head: float  # Σ_i tr cov(ĝ_i) ‖h_i‖²

    def scaled(self, factor: float) -> Noise:
        return Noise(factor**2 * self.rows, factor**2 * self.head)


BLOCK_ROWS = 192
NO_ERROR, NO_NOISE = Error(0.0, Length(0.0, 0.0, 0), 0.0), Noise(0.0, 0.0)


def head_gradient(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Length]:
    """M [V, D] and its length, from the gradients [n, V] and the hidden states [n, D] of each completion."""
    total, scatter, completions = torch.zeros(()), 0.0, 0
    for block in _blocks(parts):
        for gradient, hidden in block:
            scatter += inner(gradient @ gradient.t(), hidden @ hidden.t())
        gradients, states = (torch.cat(part) for part in zip(*block, strict=True))
        total = gradients.t() @ states if completions == 0 else total.addmm_(gradients.t(), states)
        completions += len(block)
    return total, Length(inner(total, total), scatter, completions)


def _blocks(parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Completions together, of `BLOCK_ROWS` rows or a few more: M is read and written once for each block."""
    block: list[tuple[Tensor, Tensor]] = []
    for part in parts:
        block.append(part)
        if sum(len(hidden) for _, hidden in block) >= BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block


def ratios(gradient: Gradient, error: Error, noise: Noise, tokens: int) -> dict[str, float | None]:
    """`study.py` says what they are."""
    square = gradient.head.square
    estimate = square + 2.0 * error.inner + error.head.square  # ‖M̂‖²
    mean, off = gradient.head.of_mean(), error.head.of_mean() if error.head.square > 0 else 0.0
    limit = mean is not None and off is not None
    return {
        "bias": (error.rows / gradient.rows) ** 0.5,
        "variance": noise.rows / gradient.rows,
        "head_bias": (error.head.square / square) ** 0.5,
        "cosine": (square + error.inner) / (square * estimate) ** 0.5,
        "head_variance": noise.head / square,
        "limit_bias": (off / mean) ** 0.5 if limit else None,  # type: ignore[operator]
        "limit_noise": noise.head * tokens / gradient.head.completions**2 / mean if limit else None,  # type: ignore[operator]
    }


def equal_tokens(own: dict[str, float | None], bucket: dict[str, float | None]) -> float | None:
    """The tokens of a batch at which an estimator errs as much as the bucket; None for none, or where it cannot be told."""
    bias, noise, other = own["limit_bias"], own["limit_noise"], bucket["limit_bias"]
    if bias is None or other is None or not noise or bias >= other:
        return None
    return noise / (other**2 - bias**2)


def earlier_mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the counted values before each row, 0 before there are any; [N, 1] of [N]."""
    counts, kept = counted.cumsum(0) - counted.long(), values.where(counted, 0.0)
    return ((kept.cumsum(0) - kept) / counts.clamp(min=1))[:, None]


def inner(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))
