"""Which row functions run: the rule, in one place."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import cast

from torch import Tensor

from fastkl.kernels import divergence_torch, rows_torch
from fastkl.kernels.problem import Backend, Spec
from fastkl.kernels.rows import EntropyGradient, RowFunction
from fastkl.kernels.top_k import top_k

BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch")


def row_function(spec: Spec, hidden: Tensor) -> RowFunction:
    """ "auto" is Triton on CUDA and HIP devices, PyTorch elsewhere and for float64. Nothing falls back in silence."""
    rows, divergences = _modules(spec.backend, hidden)
    if spec.kind == "divergence":
        return partial(divergences.divergence, spec.variant, spec.parameter)
    if spec.kind == "top_k":
        return partial(top_k, spec.variant, rows)
    return cast(RowFunction, getattr(rows, spec.kind))


def entropy_gradient(spec: Spec, hidden: Tensor) -> EntropyGradient:
    """What goes with the row function of kind "token_nll_entropy"."""
    return cast(EntropyGradient, _modules(spec.backend, hidden)[0].entropy_gradient)


def _modules(backend: Backend, hidden: Tensor) -> tuple[ModuleType, ModuleType]:
    if backend == "triton" or (backend == "auto" and hidden.is_cuda and hidden.element_size() < 8):
        return _triton_modules(backend)
    return rows_torch, divergence_torch


def _triton_modules(backend: Backend) -> tuple[ModuleType, ModuleType]:
    try:
        from fastkl.kernels import divergence_triton, rows_triton  # imported here: Triton exists on Linux only
    except ImportError as error:
        raise RuntimeError(
            f'backend is "{backend}", which needs triton >= 3.6 here, and it cannot be imported ({error}): install it, or '
            f'pass backend="torch"'
        ) from error
    return rows_triton, divergence_triton
