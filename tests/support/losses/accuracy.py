"""The acceptance rule: a loss and its gradients beside those of a peer and of float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from problem import HEAD_OPTIONS, TRAINABLE, Problem
from torch import Tensor

from fastkl import reference


class Result(NamedTuple):
    value: Tensor
    gradients: dict[str, Tensor]


def with_gradients(
    function: Callable[..., Tensor], name: str, p: Problem, needs: tuple[str, ...] = TRAINABLE, **options: Any
) -> Result:
    """Value and gradients of `fused` or `eager`; each entry of a per-token result gets an upstream value of its own."""
    p = p.leaves(needs)
    value = function(name, p, **options)
    upstream = None
    if value.dim():
        upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    value.backward(upstream)
    wanted = {f: getattr(p, f) for f in needs if getattr(p, f) is not None}
    return Result(value.detach(), {f: torch.zeros_like(t) if t.grad is None else t.grad for f, t in wanted.items()})


def logit_scale(p: Problem, **options: Any) -> float:
    """The largest finite logit, at least 1: a float32 logit is off by about eps times that, whoever computes it."""
    head = {k: v for k, v in options.items() if k in HEAD_OPTIONS}
    double = p.double()
    z = reference.logits(double.hidden, double.weight, double.bias, **head)
    return float(z.where(z.isfinite(), 0.0).abs().max().clamp(min=1.0)) if z.numel() else 1.0


def assert_as_accurate(what: str, ours: Tensor, peer: Tensor, exact: Tensor, slack: float, factor: float = 2.0) -> None:
    """|ours − exact| ≤ factor · max |peer − exact| + slack, everywhere; the message has the worst place.

    The maximum runs over the whole tensor: a peer that happens to be exact at one place says nothing about that place. Nor
    does one that has NaN there.
    """
    assert ours.shape == exact.shape, f"{what}: {list(ours.shape)} instead of {list(exact.shape)}"
    if ours.numel() == 0:
        return
    error = (ours.double() - exact).abs()
    allowed = float(factor * (peer.double() - exact).abs().nan_to_num(nan=0.0).max() + slack)
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    values = [float(t.reshape(-1)[worst]) for t in (ours, peer, exact)]
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
    assert float(error.reshape(-1)[worst]) <= allowed, (
        f"{what} at {place}: fastkl {values[0]!r}, eager {values[1]!r}, float64 {values[2]!r}; allowed error {allowed:.3g}"
    )


def assert_results_as_accurate(ours: Result, peer: Result, exact: Result, p: Problem, **options: Any) -> None:
    """The rule for the value and every gradient of problem `p`.

    On top of the peer's error: the rounding of float32 logits; of float32 probabilities, which cancel in p − 1 (a product
    with the other factor of the GEMM carries that into a gradient); and of a gradient to its own dtype, which happens
    twice (the unit gradient, then its product with the upstream one).
    """
    float32, logits = 4 * torch.finfo(torch.float32).eps, logit_scale(p, **options)
    value_size = max(1.0, largest(exact.value))
    assert_as_accurate("value", ours.value, peer.value, exact.value, float32 * logits * value_size)
    factors = {"hidden": largest(p.weight), "weight": largest(p.hidden), "bias": 1.0}
    for field, gradient in ours.gradients.items():
        expected = exact.gradients[field]
        own = 4 * torch.finfo(gradient.dtype).eps
        slack = (float32 * logits + own) * largest(expected) + float32 * factors[field]
        assert_as_accurate(f"gradient of {field}", gradient, peer.gradients[field], expected, slack)


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def assert_same(ours: Result, other: Result, tolerance: float = 1e-10) -> None:
    """Equal up to the rounding of float64 sums."""
    torch.testing.assert_close(ours.value, other.value, rtol=tolerance, atol=tolerance)
    for field, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[field], rtol=tolerance, atol=tolerance)
