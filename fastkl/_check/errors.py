"""How far a result is from the one in float64, and how far it may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of one number that is rounded to a dtype, relative to it. Twice that of rounding to nearest: some hardware cuts off.
# That of float32 is in the other bounds.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
VALUES = 1e-5  # of values made in float32, relative to 1 + their size
SCORES = 5e-5  # of those that begin with a product
GRADIENTS = 2e-5  # of gradients made in float32


class Measured(NamedTuple):
    """One comparison."""

    kernel: str  # family.function
    quantity: str
    error: float
    bound: float
    reason: str = ""  # why there is no error to name

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


class Check(NamedTuple):
    """A test of one kernel or more."""

    kernels: tuple[str, ...]
    variant: str
    run: Callable[[], Any]  # only launches, so that it can be compiled in advance
    measure: Callable[[Any], list[Measured]]  # compares what `run` gave


def of_values(found: Tensor, exact: Tensor) -> float:
    """max |found − exact| / (1 + |exact|)."""
    exact = exact.double().cpu()
    return _largest((found.double().cpu() - exact).abs() / (1.0 + exact.abs()))


def of_entries(found: Tensor, exact: Tensor, scale: Tensor | float, dtype: torch.dtype) -> float:
    """max |found − exact| / (|exact| + scale + the smallest normal number of `dtype`), [n, V], for what is kept in it.

    Nearly all entries of a gradient by logits are tail. A norm would not see them beside the few large ones. `scale` is of
    the terms that cancel in an entry, as the probabilities.
    """
    size = exact.abs() + scale + torch.finfo(dtype).smallest_normal
    return _largest((found.double().cpu() - exact).abs() / size)


def of_rows(found: Tensor, exact: Tensor) -> float:
    """max over rows ‖found − exact‖ / ‖exact‖, [n, D]; rows that are 0 must be 0."""
    difference = torch.linalg.vector_norm(found.double().cpu() - exact, dim=-1)
    size = torch.linalg.vector_norm(exact, dim=-1)
    return _largest(difference / size.where(size > 0, torch.finfo(torch.float32).tiny))


def of_tensor(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return of_rows(found.reshape(1, -1), exact.reshape(1, -1))


def _largest(errors: Tensor) -> float:
    """NaN counts as infinite."""
    return errors.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if errors.numel() else 0.0
