"""The three products of a chunk: logits, gradient of the hidden states, gradient of the weight.

Every product accumulates in the *compute dtype*: float64 for float64 inputs, else float32. Low-precision inputs keep
their fp32 accumulator: on CUDA by a GEMM that writes fp32 (`out_dtype`), elsewhere by casting the weight up a block of the
vocabulary at a time, so that no fp32 copy of the whole weight ever exists.

Under torch.set_float32_matmul_precision("high") a vendor's GEMM rounds fp32 operands to TF32, and still sums in fp32. That
is the user's choice for all of a process, and none of the driver's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

UPCAST_BLOCK_BYTES = 32 * 2**20
# Columns of the logits that a CPU makes at a time. They and their rows of the weight stay in its cache: the product and the
# copy take less time than a product that writes among all columns.
TILE_COLUMNS = 512
CAST_BYTES = 2**20  # of what a CPU casts at a time
ROW_MULTIPLE = {"cpu": 1, "accelerator": 64}  # elements


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits and accumulators have for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def even_chunks(n: int, limit: int, multiple: int = 1) -> list[slice]:
    """Rows 0 … n in as few chunks of at most `limit` as there can be, all but the last a multiple of `multiple`.

    They are as even as that allows, for a GEMM of a few rows is slow. `limit` is at least `multiple`.
    """
    if n <= limit:
        return [slice(0, n)] if n > 0 else []
    units, most = -(-n // multiple), limit // multiple
    count = -(-units // most)
    # The multiple nearest to an even split, unless what is left would be more than the limit.
    even = [(2 * n * i + count * multiple) // (2 * count * multiple) for i in range(count)]
    starts = [multiple * max(unit, units - most * (count - i)) for i, unit in enumerate(even)]
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, n])]


def most_rows(chunks: list[slice]) -> int:
    """The rows of the largest chunk."""
    return max((rows.stop - rows.start for rows in chunks), default=0)


def new_scores(hidden: Tensor, n: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Room for something of n rows by the vocabulary, on the device of `hidden`.

    On an accelerator rows begin ROW_MULTIPLE elements apart or a multiple of that: products and row kernels move 16 bytes
    at a time, and an odd vocabulary must not keep them from it. What lies between two rows is nobody's.
    """
    return hidden.new_empty(n, row_length(vocabulary, hidden.device), dtype=dtype)[:, :vocabulary]


def row_length(vocabulary: int, device: torch.device) -> int:
    """Elements from one row of `new_scores` to the next."""
    multiple = ROW_MULTIPLE["cpu" if device.type == "cpu" else "accelerator"]
    return -(-vocabulary // multiple) * multiple


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, out: Tensor) -> None:
    """out = alpha (hidden weightᵀ + bias); hidden [n, D], weight [V, D], bias [V], out [n, V] in the compute dtype."""
    if _writes_fp32(hidden):
        torch.addmm(out, hidden, weight.t(), out.dtype, beta=0.0, alpha=alpha, out=out)
        if bias is not None:
            out.add_(bias, alpha=alpha)
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


def add_bias_gradient(accumulator: Tensor, gradient: Tensor, scale: Tensor) -> None:
    """accumulator += gradientᵀ scale; accumulator [V] and scale [n] in the compute dtype, gradient in `gradient_dtype`.

    The scale goes into 16 bits as a sum of three numbers, in one product: two have too few bits, and a sum over all tokens
    keeps what they lack. They are a fraction of the largest scale, so that float16 holds them.
    """
    if gradient.dtype == accumulator.dtype:
        accumulator.addmv_(gradient.t(), scale)
        return
    size = scale.abs().amax().clamp(min=torch.finfo(scale.dtype).tiny)
    parts, rest = scale.new_empty(3, scale.shape[0], dtype=gradient.dtype), scale / size
    for part in parts:
        part.copy_(rest)
        rest = rest - part
    accumulator.addcmul_(torch.mm(parts, gradient, accumulator.dtype).sum(0), size)


def scaled_into(out: Tensor, tensor: Tensor, factor: Tensor) -> Tensor:
    """out = factor · tensor, in the compute dtype and in one pass; factor [1] in it, tensor and out [n, ...].

    A CPU casts a copy, of what then is a few rows: they stay in its cache.
    """
    step = max(1, CAST_BYTES // max(1, tensor[:1].numel() * factor.itemsize)) if tensor.is_cpu else max(1, len(tensor))
    for source, target in zip(tensor.split(step), out.split(step), strict=True):
        torch.mul(source, factor, out=target)
    return out


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
