"""The steps of a block in the sparse backward (`triton.py`), each a launch or two of `triton_kernels.py`.

The rows of W are gathered through pointers, 16 bytes per thread where D and the distances of rows are multiples of 16, and
u has room up to one after V, as the driver's has; tensor descriptors cannot gather on sm_90. Nothing here was measured.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastkl.kernels.launch import LaunchConfig, check_device, launch, product_config, suits_vectors, target_of
from fastkl.kernels.rows.launch import GRADIENT_DTYPES
from fastkl.kernels.sparse.estimator import SPLIT
from fastkl.kernels.sparse.triton_kernels import (
    PAD,
    column_squares_kernel,
    compact_kernel,
    count_columns_kernel,
    hidden_gradient_kernel,
    list_columns_kernel,
    weight_gradient_kernel,
)

SQUARES = LaunchConfig(8, 1024)
DRAW = LaunchConfig(block_n=1024)
COMPACT = LaunchConfig(block_n=2048, num_warps=8)
HELD = 192  # of the inner length of dh: three buffers of 64, with which two programs share a multiprocessor of sm_90
PROGRAMS = 2  # per multiprocessor, that take the tiles of dW


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
    partials = weights.new_empty(triton.cdiv(n, SPLIT), vocabulary)
    launch(
        column_squares_kernel,
        (triton.cdiv(vocabulary, SQUARES.block_n), partials.shape[0]),
        SQUARES,
        gradient.device,
        u_ptr=gradient,
        u_stride_row=gradient.stride(0),
        weights_ptr=weights,
        partials_ptr=partials,
        n=n,
        vocabulary=vocabulary,
        SPLIT=SPLIT,
    )
    return partials.sum(0)


def select_columns(w: Tensor, tau: Tensor, seed: int, block: int) -> Selection:
    """Column v is kept with probability w[v] / τ, at most 1, independently of the others; w [V], τ [1] float32.

    A τ below 0 keeps all with 1 / π = 1. Columns with w / τ < 2⁻²⁴ are never kept.
    """
    vocabulary = w.shape[0]
    ids = torch.empty(vocabulary, dtype=torch.int32, device=w.device)
    inverse = torch.empty_like(w)
    counts = ids.new_empty(triton.cdiv(vocabulary, DRAW.block_n))
    low, high = _halves(seed)
    draw = {
        "norms_ptr": w,
        "tau_ptr": tau,
        "counts_ptr": counts,
        "seed_low": low,
        "seed_high": high,
        "block": block,
        "vocabulary": vocabulary,
    }
    launch(count_columns_kernel, (len(counts),), DRAW, w.device, **draw)
    ends = counts.cumsum(0, dtype=torch.int32)
    listed = {"ends_ptr": ends, "ids_ptr": ids, "inverse_ptr": inverse}
    launch(list_columns_kernel, (len(counts),), DRAW, w.device, **draw, **listed)
    return Selection(ids, inverse, ends[-1:], tau)


def compact(gradient: Tensor, columns: Selection, summed: bool) -> Tensor:
    """Moves gradient[:, ids] / π to the first K columns. Each row's Σ û − Σ u, [B], where Σ u is 0 if not `summed`."""
    n, vocabulary = gradient.shape
    excess = torch.empty(n, dtype=torch.float32, device=gradient.device)
    launch(
        compact_kernel,
        (n,),
        COMPACT,
        gradient.device,
        u_ptr=gradient,
        u_stride_row=gradient.stride(0),
        ids_ptr=columns.ids,
        inverse_ptr=columns.inverse,
        count_ptr=columns.kept,
        tau_ptr=columns.tau,
        excess_ptr=excess,
        vocabulary=vocabulary,
        width=_width(gradient),
        SUMMED=summed,
    )
    return excess


def hidden_gradient(
    gradient: Tensor, weight: Tensor, columns: Selection, slope: Tensor, excess: Tensor, centre: Tensor
) -> Tensor:
    """slope · (û weight[ids] − excess · centre) [B, D] in the weight's dtype; û in the first columns of `gradient`."""
    n, dim = gradient.shape[0], weight.shape[1]
    out = weight.new_empty(n, dim)
    config = _product_config(gradient, weight)
    config = config._replace(num_stages=min(config.num_stages or 1, HELD // config.block_k))
    launch(
        hidden_gradient_kernel,
        (triton.cdiv(n, config.block_m) * triton.cdiv(dim, config.block_n),),
        config,
        gradient.device,
        **_estimate_arguments(gradient, columns),
        w_ptr=weight,
        w_stride_row=weight.stride(0),
        dim=dim,
        slope_ptr=slope.contiguous(),
        excess_ptr=excess,
        centre_ptr=centre,
        out_ptr=out,
    )
    return out


def add_to_weight_gradient(accumulator: Tensor, gradient: Tensor, hidden: Tensor, columns: Selection) -> None:
    """accumulator[ids] += ûᵀ hidden; accumulator [V, D] float32, û and hidden [B, D] of one dtype."""
    launch(
        weight_gradient_kernel,
        (_programs(gradient.device),),
        _product_config(gradient, hidden),
        gradient.device,
        **_estimate_arguments(gradient, columns),
        h_ptr=hidden,
        h_stride_row=hidden.stride(0),
        dim=hidden.shape[1],
        accumulator_ptr=accumulator,
        accumulator_stride_row=accumulator.stride(0),
        accumulator_stride_column=accumulator.stride(1),
    )


def _estimate_arguments(gradient: Tensor, columns: Selection) -> dict[str, Any]:
    """û as arguments of a product."""
    return {
        "u_ptr": gradient,
        "u_stride_row": gradient.stride(0),
        "n": gradient.shape[0],
        "width": _width(gradient),
        "ids_ptr": columns.ids,
        "count_ptr": columns.kept,
    }


def _product_config(gradient: Tensor, other: Tensor) -> LaunchConfig:
    """Blind to what was drawn, too."""
    vectors = suits_vectors(gradient, _width(gradient)) and suits_vectors(other)
    return product_config(target_of(gradient.device), gradient.dtype, vectors)


def _width(gradient: Tensor) -> int:
    """Elements of a row that are its own: V, and those up to a multiple of PAD that lie before the next row."""
    (n, vocabulary), stride = gradient.shape, gradient.stride(0)
    width = triton.cdiv(vocabulary, PAD.value) * PAD.value
    room = gradient.untyped_storage().nbytes() // gradient.itemsize - gradient.storage_offset()
    return width if width <= stride and (n - 1) * stride + width <= room else vocabulary


def _programs(device: torch.device) -> int:
    """The number of programs that share the tiles of dW, of which no bit depends."""
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def _halves(seed: int) -> tuple[int, int]:
    """The seed as two int32, low and high: as one number its type, and with it the kernel, would depend on its size."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
