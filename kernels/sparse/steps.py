"""The steps of a block in the sparse backward (`triton.py`), each a launch or two of `triton_kernels.py`.

Operands of 16 bits are multiplied by tensor cores: wgmma on sm_90, tcgen05 on sm_100, mma and mfma elsewhere. The rows of
W are gathered through pointers, 16 bytes per thread where V, D and the distances of rows are multiples of 16; tensor
descriptors cannot gather on sm_90. float32 is multiplied as float32, without tensor cores on NVIDIA's chips, slower than by
a vendor's GEMM. Nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fastkl.kernels.rows.launch import GRADIENT_DTYPES, check_device, current_target, launch_on
from fastkl.kernels.sparse.estimator import SPLIT
from fastkl.kernels.sparse.triton_kernels import (
    column_squares_kernel,
    compact_kernel,
    count_columns_kernel,
    hidden_gradient_kernel,
    list_columns_kernel,
    weight_gradient_kernel,
)

SQUARES = 8, 1024  # rows and columns that it holds at a time
TILE = 1024  # columns of a program that draws
COMPACTED = 2048  # columns of a row that move at a time
PROGRAMS = 2  # per multiprocessor, that take the tiles of dW


class LaunchConfig(NamedTuple):
    block_m: int  # of a tile of the result
    block_n: int
    block_k: int  # of the inner length, per step
    num_warps: int
    num_stages: int  # steps whose operands are on their way or in use


def launch_config(target: GPUTarget, dtype: torch.dtype, vectors: bool) -> LaunchConfig:
    """The shape of a program that multiplies operands of `dtype`: a rule, not an autotuner, and blind to B and K.

    The order of sums, and with it the bits of a gradient, must not depend on a timing, nor on what was drawn.
    """
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 16, 8, 2)
    if not vectors:
        return LaunchConfig(64, 64, 32, 8, 1)
    if target.backend == "hip":
        return LaunchConfig(128, 128, 64, 8, 2)
    if target.arch // 10 in (9, 10):
        return LaunchConfig(128, 128, 64, 8, 4)
    return LaunchConfig(128, 128, 32, 8, 4)


class Selection(NamedTuple):
    """The kept columns of a block."""

    ids: Tensor  # [V] int32, of which the first K ascend
    inverse: Tensor  # [V], 1 / π of those K
    kept: Tensor  # [1] int32, K
    tau: Tensor  # [1]; −1: all columns are kept as they are


def column_squares(gradient: Tensor, weights: Tensor) -> Tensor:
    """Σ_i weights[i] gradient[i, v]², [V] float32, for gradient [B, V] and weights [B]."""
    check_device("chunk is", gradient)
    if gradient.dtype not in GRADIENT_DTYPES:
        raise TypeError(
            f"the sparse backward in Triton takes gradients of float32, bfloat16 or float16, not {gradient.dtype}: pass "
            f'backend="torch"'
        )
    n, vocabulary = gradient.shape
    rows, columns = SQUARES
    partials = weights.new_empty(triton.cdiv(n, SPLIT), vocabulary)
    with launch_on(gradient):
        column_squares_kernel[(triton.cdiv(vocabulary, columns), partials.shape[0])](
            # data
            gradient,
            weights,
            partials,
            # shapes
            n,
            vocabulary,
            # strides
            gradient.stride(0),
            # constants
            SPLIT=SPLIT,
            BLOCK_M=rows,
            BLOCK_N=columns,
            num_warps=4,
        )
    return partials.sum(0)


def select_columns(w: Tensor, tau: Tensor, seed: int, block: int) -> Selection:
    """Column v is kept with probability w[v] / τ, at most 1, independently of the others; w [V], τ [1] float32.

    A τ below 0 keeps all with 1 / π = 1. Columns with w / τ < 2⁻²⁴ are never kept.
    """
    vocabulary = w.shape[0]
    ids = torch.empty(vocabulary, dtype=torch.int32, device=w.device)
    inverse = torch.empty_like(w)
    counts = ids.new_empty(triton.cdiv(vocabulary, TILE))
    drawn = *_halves(seed), block
    with launch_on(w):
        count_columns_kernel[counts.shape](
            # data
            w,
            tau,
            counts,
            *drawn,
            # shapes
            vocabulary,
            # constants
            BLOCK=TILE,
        )
        ends = counts.cumsum(0, dtype=torch.int32)
        list_columns_kernel[counts.shape](
            # data
            w,
            tau,
            counts,
            ends,
            ids,
            inverse,
            *drawn,
            # shapes
            vocabulary,
            # constants
            BLOCK=TILE,
        )
    return Selection(ids, inverse, ends[-1:], tau)


def compact(gradient: Tensor, columns: Selection, capped: bool) -> Tensor:
    """Moves gradient[:, ids] / π to the first K columns. Each row's Σ û − Σ u, [B], where Σ u is 0 if not `capped`."""
    n, vocabulary = gradient.shape
    excess = torch.empty(n, dtype=torch.float32, device=gradient.device)
    with launch_on(gradient):
        compact_kernel[(n,)](
            # data
            gradient,
            *columns,
            excess,
            # shapes
            vocabulary,
            # strides
            gradient.stride(0),
            # constants
            CAPPED=capped,
            BLOCK=COMPACTED,
            num_warps=8,
        )
    return excess


def hidden_gradient(
    gradient: Tensor, weight: Tensor, columns: Selection, slope: Tensor, excess: Tensor, centre: Tensor
) -> Tensor:
    """slope · (û weight[ids] − excess · centre) [B, D] in the weight's dtype; û in the first columns of `gradient`."""
    n, vocabulary = gradient.shape
    dim = weight.shape[1]
    out = weight.new_empty(n, dim)
    config = _config(gradient, weight)
    with launch_on(gradient):
        hidden_gradient_kernel[(triton.cdiv(n, config.block_m) * triton.cdiv(dim, config.block_n),)](
            # data
            gradient,
            weight,
            columns.ids,
            columns.kept,
            slope.contiguous(),
            excess,
            centre,
            out,
            # shapes
            n,
            vocabulary,
            dim,
            # strides
            gradient.stride(0),
            weight.stride(0),
            # constants
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def add_to_weight_gradient(accumulator: Tensor, gradient: Tensor, hidden: Tensor, columns: Selection) -> None:
    """accumulator[ids] += ûᵀ hidden; accumulator [V, D] float32, û and hidden [B, D] of one dtype."""
    n, vocabulary = gradient.shape
    config = _config(gradient, hidden)
    with launch_on(gradient):
        weight_gradient_kernel[(_programs(gradient.device),)](
            # data
            gradient,
            hidden,
            columns.ids,
            columns.kept,
            accumulator,
            # shapes
            n,
            vocabulary,
            hidden.shape[1],
            # strides
            gradient.stride(0),
            hidden.stride(0),
            *accumulator.stride(),
            # constants
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _config(gradient: Tensor, other: Tensor) -> LaunchConfig:
    vectors = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in (gradient, other))
    return launch_config(current_target(), gradient.dtype, vectors)


def _programs(device: torch.device) -> int:
    """The number of programs that share the tiles of dW, of which no bit depends."""
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _halves(seed: int) -> tuple[int, int]:
    """The seed as two int32, low and high: as one number its type, and with it the kernel, would depend on its size."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
