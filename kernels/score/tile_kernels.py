"""The kernels that score: each multiplies and reduces one split of the vocabulary for one tile of rows (`triton.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import raise_max

LOG2_E = tl.constexpr(1.4426950408889634)

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
    first_row, split = _work_item(n, splits, group, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)  # Σ 2^a a
    for start in tl.range(split * width, min((split + 1) * width, vocabulary), BLOCK_N, flatten=True):
        s = _scores(
            h, w, bias_ptr, alpha, first_row, start, n, vocabulary, dim, h_stride_row, w_stride_row,
            CAPPED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
        m, base, step = raise_max(m, s, scale * LOG2_E, 1)
        a = (s - base[:, None]) * (scale * LOG2_E)
        e = tl.exp2(a)
        factor = tl.exp2(step)
        if ENTROPY:
            carried = carry_base2(weighted, total, step, factor)
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
    first_row, split = _work_item(n, splits, group, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    if tokens_ptr is not None:
        y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_t = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    total_t = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)  # Σ 2^a δ
    lost = tl.full([BLOCK_M], float("-inf"), tl.float32)  # the largest s among tokens that the teacher cannot emit
    for start in tl.range(split * width, min((split + 1) * width, vocabulary), BLOCK_N):
        s = _scores(
            h, w, bias_ptr, alpha, first_row, start, n, vocabulary, dim, h_stride_row, w_stride_row,
            CAPPED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        s_t = _scores(
            h_t, w_t, bias_t_ptr, alpha_t, first_row, start, n, vocabulary, dim_t, h_t_stride_row, w_t_stride_row,
            CAPPED_T, EVEN_K_T, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if tokens_ptr is not None:
            _store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
        m, base, step = raise_max(m, s, scale * LOG2_E, 1)
        m_t, base_t, step_t = raise_max(m_t, s_t, scale_t * LOG2_E, 1)
        a = (s - base[:, None]) * (scale * LOG2_E)
        a_t = (s_t - base_t[:, None]) * (scale_t * LOG2_E)
        e = tl.exp2(a)
        factor = tl.exp2(step)
        one_sided = (a == float("-inf")) | (a_t == float("-inf"))
        carried = carry_base2(weighted, total, step - step_t, factor)
        weighted = carried + tl.sum(e * tl.where(one_sided, 0.0, a - a_t), 1)
        lost = tl.maximum(lost, tl.max(tl.where(a_t == float("-inf"), s, float("-inf")), 1))
        total = tl.fma(total, factor, tl.sum(e, 1))
        total_t = tl.fma(total_t, tl.exp2(step_t), tl.sum(tl.exp2(a_t), 1))
    partials_ptr += split.to(tl.int64) * n + rows
    value_stride = splits.to(tl.int64) * n
    inside = rows < n
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + value_stride, total, mask=inside)
    tl.store(partials_ptr + 2 * value_stride, m_t, mask=inside)
    tl.store(partials_ptr + 3 * value_stride, total_t, mask=inside)
    tl.store(partials_ptr + 4 * value_stride, weighted, mask=inside)
    tl.store(partials_ptr + 5 * value_stride, lost, mask=inside)


@triton.jit
def _work_item(n: tl.tensor, splits: tl.tensor, group: tl.tensor, BLOCK_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First row and split of this program; the row tiles of a group are neighbours."""
    program = tl.program_id(0)
    first = program // (group * splits) * group
    height = min(tl.cdiv(n, BLOCK_M) - first, group)
    within = program % (group * splits)
    return (first + within % height) * BLOCK_M, within // height


@triton.jit
def _scores(
    h: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    alpha: tl.tensor,
    first_row: tl.tensor,
    start: tl.tensor,
    n: tl.tensor,
    vocabulary: tl.tensor,
    dim: tl.tensor,
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    CAPPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A tile of s; −inf beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    if not TMA:  # rows and columns beyond the end are read as the last one
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)  # n · D and V · D exceed int32
        h_ptrs = h + rows[:, None] * h_stride_row + k[None, :]
        w_ptrs = w + tl.minimum(columns, vocabulary - 1).to(tl.int64)[None, :] * w_stride_row + k[:, None]
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, dim, BLOCK_K):
        if TMA:
            a = h.load([first_row, done])
            b = w.load([start, done]).T
        elif EVEN_K:
            a = tl.load(h_ptrs + done)
            b = tl.load(w_ptrs + done)
        else:
            a = tl.load(h_ptrs + done, mask=k[None, :] < dim - done, other=0.0)
            b = tl.load(w_ptrs + done, mask=k[:, None] < dim - done, other=0.0)
        s = tl.dot(a, b, s, input_precision="ieee")
    if bias_ptr is not None:
        s += tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        s = tanh_base2(s * alpha)
    return tl.where((columns < vocabulary)[None, :], s, float("-inf"))


@triton.jit
def load_tokens(
    tokens_ptr: tl.tensor, rows: tl.tensor, n: tl.tensor, vocabulary: tl.tensor, tokens_stride: tl.tensor
) -> tl.tensor:
    """The tokens of `rows`; −1 where there is no such token."""
    y = tl.load(tokens_ptr + rows.to(tl.int64) * tokens_stride, mask=rows < n, other=-1)
    return tl.where((y >= 0) & (y < vocabulary), y, -1).to(tl.int32)


@triton.jit
def _store_targets(
    targets_ptr: tl.tensor, s: tl.tensor, y: tl.tensor, rows: tl.tensor, start: tl.tensor, BLOCK_N: tl.constexpr
) -> None:
    """Stores s[y] for the rows whose token is in this tile. Most tiles have none and skip the search."""
    in_tile = (y >= start) & (y < start + BLOCK_N)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        columns = start + tl.arange(0, BLOCK_N)
        target = tl.sum(tl.where(columns[None, :] == y[:, None], s, 0.0), 1)
        tl.store(targets_ptr + rows, target, mask=in_tile)


@triton.jit
def carry_base2(weighted: tl.tensor, total: tl.tensor, shift: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """2^d (Σ 2^a x + l d_x); 0 where nothing of l remains, for d may be infinite there."""
    return tl.where(total * factor > 0.0, factor * tl.fma(total, shift, weighted), 0.0)


@triton.jit
def tanh_base2(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = tl.fma(s, tl.fma(s, tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0)
    far = tl.where(x < 0.0, -far, far)
    near = tl.fma(x * s, near, x)
    return tl.where(tl.abs(x) < 0.25, near, far)
