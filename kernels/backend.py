"""Which row functions run: the rule, in one place."""

from __future__ import annotations

from types import ModuleType
from typing import cast

from torch import Tensor

from fastkl.kernels import rows_torch
from fastkl.kernels.problem import Backend, Kind
from fastkl.kernels.rows import RowFunction

BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")


def row_function(kind: Kind, backend: Backend, hidden: Tensor) -> RowFunction:
    """ "auto" is Triton on CUDA and HIP devices, PyTorch elsewhere and for float64. Nothing falls back in silence."""
    return cast(RowFunction, getattr(_module(backend, hidden), kind))


def _module(backend: Backend, hidden: Tensor) -> ModuleType:
    if backend == "triton" or (backend == "auto" and hidden.is_cuda and hidden.element_size() < 8):
        return _rows_triton(backend)
    return rows_torch


def _rows_triton(backend: Backend) -> ModuleType:
    try:
        from fastkl.kernels import rows_triton  # imported here: Triton exists on Linux only
    except ImportError as error:
        raise RuntimeError(
            f'backend is "{backend}", which needs triton >= 3.6 here, and it cannot be imported ({error}): install it, or '
            f'pass backend="torch"'
        ) from error
    return rows_triton
