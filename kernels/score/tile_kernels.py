"""The kernels that score: each multiplies and reduces one split of the vocabulary for one tile of rows (`triton.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import LOG2E
from fastkl.kernels.score.tiles import (
    carry_base2,
    finished,
    load_tokens,
    raise_max,
    scores,
    step,
    store_targets,
    work_item,
)

# Declares a kernel of this room. These are the parameters that vary from call to call.
score_kernel: Callable[[Any], Any] = triton.jit(
    do_not_specialize=["n", "splits", "width", "group", "tokens_stride", "out_stride_value", "out_stride_row"],
    do_not_specialize_on_alignment=["tokens_ptr", "partials_ptr", "targets_ptr", "out_ptr"],
)


@score_kernel
def token_nll_kernel(
    # data
    h: tl.tensor,  # [n, D]
    w: tl.tensor,  # [V, D]
    bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    partials_ptr: tl.tensor,  # [2 or 3, splits, n]
    targets_ptr: tl.tensor,  # [n]
    alpha: tl.tensor,
    scale: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    dim: tl.tensor,
    splits: tl.tensor,
    width: tl.tensor,  # columns of a split
    group: tl.tensor,  # row tiles that share the cache
    # strides
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides D
    TMA: tl.constexpr,  # h and w are tensor descriptors, not pointers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    tl.assume(dim > 0)  # else the compiler adds a loop for tiles without a step, which doubles the code
    first_row, split = work_item(n, splits, group, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)  # Σ 2^a a
    for start in tl.range(split * width, min((split + 1) * width, vocabulary), BLOCK_N, flatten=True):
        s = scores(
            h, w, bias_ptr, alpha, first_row, start, n, vocabulary, dim, h_stride_row, w_stride_row,
            CAPPED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
        m, base, shift = raise_max(m, s, scale)
        a = (s - base[:, None]) * (scale * LOG2E)
        e = tl.exp2(a)
        factor = tl.exp2(shift)
        if ENTROPY:
            carried = carry_base2(weighted, total, shift, factor)
            weighted = carried + tl.sum(tl.where(a == float("-inf"), 0.0, e * a), 1)
        total = tl.fma(total, factor, tl.sum(e, 1))
    partials_ptr += split.to(tl.int64) * n + rows
    value_stride = splits.to(tl.int64) * n
    inside = rows < n
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + value_stride, total, mask=inside)
    if ENTROPY:
        tl.store(partials_ptr + 2 * value_stride, weighted, mask=inside)


@score_kernel
def reverse_kl_kernel(
    # data
    h: tl.tensor,  # [n, D]
    w: tl.tensor,  # [V, D]
    bias_ptr: tl.tensor,  # [V] or None
    h_t: tl.tensor,  # [n, D_t]
    w_t: tl.tensor,  # [V, D_t]
    bias_t_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n] or None
    partials_ptr: tl.tensor,  # [6, splits, n]
    targets_ptr: tl.tensor,  # [n], or None without tokens
    alpha: tl.tensor,
    scale: tl.tensor,
    alpha_t: tl.tensor,
    scale_t: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    dim: tl.tensor,
    dim_t: tl.tensor,
    splits: tl.tensor,
    width: tl.tensor,  # columns of a split
    group: tl.tensor,  # row tiles that share the cache
    # strides
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    h_t_stride_row: tl.tensor,
    w_t_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    CAPPED_T: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides D
    EVEN_K_T: tl.constexpr,
    TMA: tl.constexpr,  # h, w, h_t and w_t are tensor descriptors, not pointers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    first_row, split = work_item(n, splits, group, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    if tokens_ptr is not None:
        y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_t = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    total_t = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)  # Σ 2^a δ
    lost = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest s among tokens that the teacher cannot emit
    # One pipeline for both heads: the steps of the student's D, then those of the teacher's. What is loaded next must not
    # hang on the reduction, so `start` and `done` move outside of its branch. A second branch that read `product` would
    # need a wait of its own, which the compiler (3.7) leaves out: both heads end in one.
    first, last = split * width, min((split + 1) * width, vocabulary)
    steps, steps_t = tl.cdiv(dim, BLOCK_K), tl.cdiv(dim_t, BLOCK_K)
    start, done = first, 0
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, tl.cdiv(last - first, BLOCK_N) * (steps + steps_t)):
        students = done < steps
        if students:
            hidden, weight = h, w
        else:
            hidden, weight = h_t, w_t
        product = step(
            product, hidden, weight, first_row, start, tl.where(students, done, done - steps) * BLOCK_K,
            n, vocabulary, tl.where(students, dim, dim_t),
            tl.where(students, h_stride_row, h_t_stride_row), tl.where(students, w_stride_row, w_t_stride_row),
            EVEN_K and EVEN_K_T, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if (done == steps - 1) | (done == steps + steps_t - 1):
            if students:
                s = finished(product, bias_ptr, alpha, start, vocabulary, CAPPED, BLOCK_N)
                if tokens_ptr is not None:
                    store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
            else:
                s_t = finished(product, bias_t_ptr, alpha_t, start, vocabulary, CAPPED_T, BLOCK_N)
                m, base, shift = raise_max(m, s, scale)
                m_t, base_t, shift_t = raise_max(m_t, s_t, scale_t)
                a = (s - base[:, None]) * (scale * LOG2E)
                a_t = (s_t - base_t[:, None]) * (scale_t * LOG2E)
                e = tl.exp2(a)
                factor = tl.exp2(shift)
                one_sided = (a == float("-inf")) | (a_t == float("-inf"))
                carried = carry_base2(weighted, total, shift - shift_t, factor)
                weighted = carried + tl.sum(e * tl.where(one_sided, 0.0, a - a_t), 1)
                lost = tl.maximum(lost, tl.max(tl.where(a_t == float("-inf"), s, float("-inf")), 1))
                total = tl.fma(total, factor, tl.sum(e, 1))
                total_t = tl.fma(total_t, tl.exp2(shift_t), tl.sum(tl.exp2(a_t), 1))
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        done += 1
        tile_ends = done == steps + steps_t
        start = tl.where(tile_ends, start + BLOCK_N, start)
        done = tl.where(tile_ends, 0, done)
    partials_ptr += split.to(tl.int64) * n + rows
    value_stride = splits.to(tl.int64) * n
    inside = rows < n
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + value_stride, total, mask=inside)
    tl.store(partials_ptr + 2 * value_stride, m_t, mask=inside)
    tl.store(partials_ptr + 3 * value_stride, total_t, mask=inside)
    tl.store(partials_ptr + 4 * value_stride, weighted, mask=inside)
    tl.store(partials_ptr + 5 * value_stride, lost, mask=inside)
