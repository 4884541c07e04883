"""The three products of a chunk: logits, gradient of the hidden states, gradient of the weight.

Every product accumulates in the *compute dtype*: float64 for float64 inputs, else float32. Low-precision inputs keep
their fp32 accumulator: on CUDA by a GEMM that writes fp32 (`out_dtype`), elsewhere by casting the weight up a block of the
vocabulary at a time, so that no fp32 copy of the whole weight ever exists.

Under torch.set_float32_matmul_precision("high") a vendor's GEMM rounds fp32 operands to TF32, and still sums in fp32. That
is the user's choice for all of a process, and none of the driver's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_BLOCK_BYTES = 32 * 2**20
# Columns of the logits that a CPU makes at a time. They and their rows of the weight stay in its cache: the product and the
# copy take less time than a product that writes among all columns.
TILE_COLUMNS = 512


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits and accumulators have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def even_rows(n: int, limit: int) -> int:
    """Rows per GEMM, at most `limit` and spread evenly over as few GEMMs as that takes: one of a few rows is slow."""
    return max(1, -(-n // max(1, -(-n // limit))))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, out: Tensor) -> None:
    """out = alpha (hidden weightᵀ + bias); hidden [n, D], weight [V, D], bias [V], out [n, V] in the compute dtype."""
    if _writes_fp32(hidden):
        torch.mm(hidden, weight.t(), out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
        if alpha != 1.0:
            out.mul_(alpha)
        return
    hidden = hidden.to(out.dtype)
    scratch = out.new_empty(out.shape[0] * TILE_COLUMNS) if out.is_cpu and out.shape[1] > TILE_COLUMNS else None
    for columns, block in _tiles(weight, out.dtype) if out.is_cpu else _upcast_blocks(weight, out.dtype):
        target = out[:, columns]
        tile = target if scratch is None else scratch[: target.numel()].view_as(target)
        if bias is None:
            torch.addmm(tile, hidden, block.t(), beta=0.0, alpha=alpha, out=tile)
        else:
            torch.addmm(bias[columns].to(out.dtype), hidden, block.t(), beta=alpha, alpha=alpha, out=tile)
        if scratch is not None:
            target.copy_(tile)


def gradient_dtype(operand: Tensor) -> torch.dtype:
    """The dtype that the gradient of a chunk's scores is multiplied in: that of the operands, or the compute dtype."""
    return operand.dtype if _writes_fp32(operand) else compute_dtype(operand.dtype)


def hidden_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight [n, D] in the compute dtype; gradient [n, V] in `gradient_dtype`, weight [V, D]."""
    if _writes_fp32(weight):
        return torch.mm(gradient, weight, compute_dtype(weight.dtype))
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    out = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for columns, block in _upcast_blocks(weight, gradient.dtype):
        out.addmm_(gradient[:, columns], block)
    return out


def add_weight_gradient(
    accumulator: Tensor, gradient: Tensor, hidden: Tensor, scale: Tensor, overwrite: bool = False
) -> None:
    """accumulator += gradientᵀ (scale · hidden); `overwrite`: = in place of +=, whatever it held.

    accumulator [V, D] and scale [n] in the compute dtype, gradient [n, V] in `gradient_dtype`, hidden [n, D] as the user
    gave it.
    """
    scaled, beta = scaled_rows(hidden, scale), 0.0 if overwrite else 1.0
    if _writes_fp32(hidden):
        low = scaled.to(hidden.dtype)
        torch.addmm(accumulator, gradient.t(), low, accumulator.dtype, beta=beta, out=accumulator)
    else:
        torch.addmm(accumulator, gradient.t(), scaled, beta=beta, out=accumulator)


def scaled_rows(hidden: Tensor, scale: Tensor) -> Tensor:
    """scale · hidden [n, D]; 0 where the scale is 0, whatever hidden holds there."""
    column = scale[:, None]
    return (hidden * column).masked_fill_(column == 0, 0.0)


def _writes_fp32(operand: Tensor) -> bool:
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16)


def _upcast_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of `weight` in `dtype`: the weight itself where it already has it."""
    if weight.dtype == dtype:
        yield slice(0, weight.shape[0]), weight
        return
    yield from _tiles(weight, dtype, max(1, UPCAST_BLOCK_BYTES // (weight.shape[1] * dtype.itemsize)))


def _tiles(weight: Tensor, dtype: torch.dtype, rows: int = TILE_COLUMNS) -> Iterator[tuple[slice, Tensor]]:
    """So many rows of `weight` at a time, in `dtype`."""
    for start in range(0, weight.shape[0], rows):
        columns = slice(start, min(start + rows, weight.shape[0]))
        yield columns, weight[columns].to(dtype)
