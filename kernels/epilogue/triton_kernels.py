"""The kernels of the plan whose logits leave their product as probabilities (`triton.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import LOG2E, slope_of_cap
from fastkl.kernels.score.merge_kernels import load_splits, load_targets
from fastkl.kernels.score.tiles import load_tokens, scores, store_targets, tanh_base2, work_item

INF = tl.constexpr(float("inf"))
SURE = tl.constexpr(80.0)  # |log l| up to which l, summed in float32, has lost nothing

# Declares a kernel of this room. These are the parameters that vary from call to call.
epilogue_kernel: Callable[[Any], Any] = triton.jit(
    do_not_specialize=["n", "splits", "width", "group", "tokens_stride", "logprobs_stride", "out_stride_row"],
    do_not_specialize_on_alignment=[
        *("tokens_ptr", "logprobs_ptr", "partials_ptr", "targets_ptr", "ref_ptr", "wrong_ptr", "factor_ptr", "out_ptr"),
    ],
)


@epilogue_kernel
def reference_kernel(
    # data
    h_ptr: tl.tensor,  # [n, D]
    w_ptr: tl.tensor,  # [V, D]
    bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    logprobs_ptr: tl.tensor,  # [n]
    ref_ptr: tl.tensor,  # [n]
    alpha: tl.tensor,
    scale: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    dim: tl.tensor,
    # strides
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    logprobs_stride: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of D held at a time
) -> None:
    """ref = s[y] − logprob / scale of a row; without the log-prob where it is not finite, 0 where s[y] is not."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(tokens_ptr + row * tokens_stride)
    y = tl.where((y >= 0) & (y < vocabulary), y, 0).to(tl.int64)
    lanes = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        h = tl.load(h_ptr + row * h_stride_row + k, mask=k < dim, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + y * w_stride_row + k, mask=k < dim, other=0.0).to(tl.float32)
        lanes += h * w
    s = tl.sum(lanes, 0)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + y).to(tl.float32)
    if CAPPED:
        s = tanh_base2(s * alpha)
    logprob = tl.load(logprobs_ptr + row * logprobs_stride)
    ref = s - tl.where(tl.abs(logprob) < INF, logprob, 0.0) / scale
    tl.store(ref_ptr + row, tl.where(tl.abs(ref) < INF, ref, 0.0))


@epilogue_kernel
def product_kernel(
    # data
    h: tl.tensor,  # [n, D]
    w: tl.tensor,  # [V, D]
    bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    ref_ptr: tl.tensor,  # [n]
    wrong_ptr: tl.tensor,  # [n] or None
    partials_ptr: tl.tensor,  # [2, splits, n]
    targets_ptr: tl.tensor,  # [n]
    u: tl.tensor,  # [n, V]
    alpha: tl.tensor,
    scale: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    room: tl.tensor,  # columns of u that may be written, at least V
    dim: tl.tensor,
    splits: tl.tensor,
    width: tl.tensor,  # columns of a split
    group: tl.tensor,  # row tiles that share the cache
    # strides
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides D
    TMA: tl.constexpr,  # h, w and u are tensor descriptors, not pointers
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """u = e · dz/dx up to a factor, e = 2^(c (s − ref)); max s and Σ e of a split; s[y]. With `wrong_ptr`, tiles of rows
    that have a wrong one are made again."""
    tl.assume(dim > 0)  # else the compiler adds a loop for tiles without a step, which doubles the code
    first_row, split = work_item(n, splits, group, BLOCK_M)
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < n
    if wrong_ptr is not None:  # noqa: SIM102  known when it is compiled, unlike what follows
        if tl.max(tl.load(wrong_ptr + rows, mask=inside, other=0), 0) == 0:
            return
    y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)
    ref = tl.load(ref_ptr + rows, mask=inside, other=0.0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(split * width, min((split + 1) * width, vocabulary), BLOCK_N, flatten=True):
        s = scores(
            h, w, bias_ptr, alpha, first_row, start, n, vocabulary, dim, h_stride_row, w_stride_row,
            CAPPED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
        m = tl.maximum(m, tl.max(s, 1))
        e = tl.exp2((s - ref[:, None]) * (scale * LOG2E))
        total += tl.sum(e, 1)
        if CAPPED:
            e *= slope_of_cap(tl.maximum(s, -1.0), 1.0)  # of s = tanh(x), −inf beyond the vocabulary
        if TMA:
            u.store([first_row, start], e.to(u.dtype))
        else:
            _store_tile(u, e, first_row, start, n, room, u_stride_row, BLOCK_M, BLOCK_N)
    partials_ptr += split.to(tl.int64) * n + rows
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + splits.to(tl.int64) * n, total, mask=inside)


@epilogue_kernel
def merge_kernel(
    # data
    partials_ptr: tl.tensor,  # [2, splits, n]
    targets_ptr: tl.tensor,  # [n]
    tokens_ptr: tl.tensor,  # [n]
    ref_ptr: tl.tensor,  # [n], a better one afterwards where it is wrong
    wrong_ptr: tl.tensor,  # [n]
    factor_ptr: tl.tensor,  # [n]
    u_ptr: tl.tensor,  # [n, V]
    out_ptr: tl.tensor,  # [1, n]
    scale: tl.tensor,
    reach: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    splits: tl.tensor,
    # strides
    u_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
) -> None:
    """out, the entry of each row's token in u, 1 / l', and which rows are wrong."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    m = tl.max(load_splits(partials_ptr, rows, n, splits, float("-inf"), SPLITS), 0)
    total = tl.sum(load_splits(partials_ptr + splits.to(tl.int64) * n, rows, n, splits, 0.0, SPLITS), 0)
    log_total = tl.log(tl.where(m == INF, float("nan"), total))
    ref = tl.load(ref_ptr + rows, mask=inside, other=0.0)
    y = load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)
    target = load_targets(targets_ptr, y, rows)
    tl.store(out_ptr + rows * out_stride_row, (ref - target) * scale + log_total, mask=inside)

    e = tl.exp2((target - ref) * (scale * LOG2E))
    slope = slope_of_cap(target, 1.0) if CAPPED else 1.0
    entry = ((e - total) * slope).to(u_ptr.dtype.element_ty)
    tl.store(u_ptr + rows * u_stride_row + y, entry, mask=inside & (y >= 0))
    exact = e - entry.to(tl.float32) / slope
    divisor = tl.where(tl.abs(exact - total) <= tl.abs(e - total) * (1.0 / 64.0), exact, total)
    undefined = (log_total != log_total) | (target != target)
    factor = tl.where(undefined, float("nan"), tl.div_rn(scale if CAPPED else 1.0, divisor))
    tl.store(factor_ptr + rows, factor, mask=inside)

    distance = tl.abs(log_total)
    wrong = (tl.abs(m) < INF) & (distance > reach)  # NaN is not: nothing makes it right
    tl.store(wrong_ptr + rows, wrong.to(tl.int32), mask=inside)
    tl.store(ref_ptr + rows, tl.where(distance < SURE, ref + log_total / scale, m), mask=inside & wrong)


@triton.jit
def _store_tile(
    u_ptr: tl.tensor,
    e: tl.tensor,
    first_row: tl.tensor,
    start: tl.tensor,
    n: tl.tensor,
    room: tl.tensor,
    u_stride_row: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Offsets within a tile fit int32, n · V does not."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    u_ptr += first_row.to(tl.int64) * u_stride_row + start
    inside = (rows < n - first_row)[:, None] & (columns < room - start)[None, :]
    tl.store(u_ptr + (rows[:, None] * u_stride_row + columns[None, :]), e.to(u_ptr.dtype.element_ty), mask=inside)
