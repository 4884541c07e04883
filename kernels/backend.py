"""Which row functions run: the rule, in one place."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from fastkl.kernels import rows_torch
from fastkl.kernels.rows import RowFunction

Backend = Literal["auto", "triton", "torch"]


class RowFunctions(NamedTuple):
    token_nll: RowFunction
    reverse_kl: RowFunction


def row_functions(backend: Backend, hidden: Tensor) -> RowFunctions:
    """ "auto" is Triton on CUDA and HIP devices, PyTorch elsewhere and for float64. Nothing falls back in silence."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; use one of {', '.join(get_args(Backend))}")
    triton = backend == "triton" or (backend == "auto" and hidden.is_cuda and hidden.element_size() < 8)
    module = _rows_triton(backend) if triton else rows_torch
    return RowFunctions(module.token_nll, module.reverse_kl)


def _rows_triton(backend: Backend) -> ModuleType:
    try:
        from fastkl.kernels import rows_triton  # imported here: Triton exists on Linux only
    except ImportError as error:
        raise RuntimeError(
            f'backend is "{backend}", which needs triton >= 3.6 here, and it cannot be imported ({error}): install it, or '
            f'pass backend="torch"'
        ) from error
    return rows_triton
