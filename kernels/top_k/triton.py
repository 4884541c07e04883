"""What is dense in `formula.py`, its `TailFunctions`, in Triton and in the way of `rows/walk.py`.

Entries of −inf are left out: `formula.top_k` has put them where the listed tokens were.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_rows, row_kernel, written_to
from fastkl.kernels.rows.walk import (
    exp,
    finite_or_zero,
    lane_sum,
    lanes,
    load_scores,
    merge,
    raise_lanes,
    spread,
    store_gradient,
    tanh,
)


def tail_sums(logits: Logits, out: Tensor, power: float | None = None) -> None:
    """out[0] = m = max z, out[1] = Σ exp(z − m), out[2] = Σ exp(power (z − m)) (`formula.TailFunctions`)."""
    launch_rows(
        _tail_sums_kernel,
        logits,
        programs=2,
        out_ptr=out,
        out_stride_value=out.stride(0),
        power=1.0 if power is None else power,
        HARD=power is not None,
    )


def tail_gradient(
    logits: Logits,
    m: Tensor,
    scale: Tensor,
    gradient: Tensor,
    hard_scale: Tensor | None = None,
    power: float = 1.0,
) -> None:
    """gradient = (scale exp(z − m) + hard_scale exp(power (z − m))) dz/dx (`formula.TailFunctions`)."""
    launch_rows(
        _tail_gradient_kernel,
        logits,
        **written_to(gradient),
        m_ptr=m.contiguous(),
        scale_ptr=scale.contiguous(),
        hard_scale_ptr=None if hard_scale is None else hard_scale.contiguous(),
        power=power,
    )


@row_kernel
def _tail_sums_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]; what is −inf is left out
    x_bias_ptr: tl.tensor,  # [V] or None
    out_ptr: tl.tensor,  # [2 or 3, n]
    cap: tl.tensor,
    power: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    out_stride_value: tl.tensor,
    # constants
    HARD: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    m = lanes(float("-inf"), BLOCK_N)
    l_lanes = lanes(0.0, BLOCK_N)
    hard_lanes = lanes(0.0, BLOCK_N)
    for start in range(0, vocabulary, BLOCK_N):
        z = _load_entries(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        m, base, step = raise_lanes(m, z, BLOCK_N)
        a = z - spread(base, BLOCK_N)
        l_lanes = tl.fma(l_lanes, exp(step), lane_sum(exp(a), BLOCK_N))
        if HARD:
            hard_lanes = tl.fma(hard_lanes, exp(step * power), lane_sum(exp(a * power), BLOCK_N))
    _, step = merge(m)
    tl.store(out_ptr + row, tl.max(m, 0))
    tl.store(out_ptr + out_stride_value + row, tl.sum(l_lanes * exp(step), 0))
    if HARD:
        tl.store(out_ptr + 2 * out_stride_value + row, tl.sum(hard_lanes * exp(step * power), 0))


@row_kernel
def _tail_gradient_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]; what is −inf is left out
    x_bias_ptr: tl.tensor,  # [V] or None
    m_ptr: tl.tensor,  # [n]
    scale_ptr: tl.tensor,  # [n]
    hard_scale_ptr: tl.tensor,  # [n] or None
    u_ptr: tl.tensor,  # [n, V], x itself or apart from it
    cap: tl.tensor,
    power: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    u_ptr += row * u_stride_row
    base, scale = finite_or_zero(tl.load(m_ptr + row)), tl.load(scale_ptr + row)
    if hard_scale_ptr is not None:
        hard_scale = tl.load(hard_scale_ptr + row)
    for start in range(0, vocabulary, BLOCK_N):
        z = _load_entries(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        u = scale * exp(z - base)
        if hard_scale_ptr is not None:
            u += hard_scale * exp((z - base) * power)
        store_gradient(u_ptr, start, vocabulary, u, tl.where(z == float("-inf"), 0.0, z), cap, CAPPED, BLOCK_N)


@triton.jit
def _load_entries(
    x_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The logits z of a block; −inf beyond the vocabulary and where x is −inf, which a cap would bring back."""
    x = load_scores(x_ptr, None, start, vocabulary, float("-inf"), BLOCK_N)
    if x_bias_ptr is not None:  # of what is left out it may be +inf
        x = tl.where(x == float("-inf"), x, x + load_scores(x_bias_ptr, None, start, vocabulary, 0.0, BLOCK_N))
    if CAPPED:
        x = tl.where(x == float("-inf"), x, cap * tanh(x))
    return x
