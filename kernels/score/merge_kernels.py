"""The kernels that merge the splits of a row, always in the same tree (`triton.py`)."""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import LN2, LOG2E, finite_or_zero
from fastkl.kernels.score.tile_kernels import score_kernel
from fastkl.kernels.score.tiles import carry_base2, load_tokens


@score_kernel
def merge_token_nll_kernel(
    # data
    partials_ptr: tl.tensor,  # [2 or 3, splits, n]
    targets_ptr: tl.tensor,  # [n]
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [1 or 5, n]
    scale: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    splits: tl.tensor,
    # strides
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    # constants
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    value_stride = splits.to(tl.int64) * n
    base, step, factor = _merged_max(partials_ptr, rows, n, splits, scale, SPLITS)
    totals = load_splits(partials_ptr + value_stride, rows, n, splits, 0.0, SPLITS)
    total = tl.sum(totals * factor, 0)
    log_total = tl.log(total)
    target = load_targets(targets_ptr, load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride), rows)
    out_ptr += rows * out_stride_row
    tl.store(out_ptr, (base - target) * scale + log_total, mask=inside)
    if ENTROPY:  # what is stored at once is held in no register
        tl.store(out_ptr + 2 * out_stride_value, base * scale, mask=inside)
        tl.store(out_ptr + 3 * out_stride_value, log_total, mask=inside)
        tl.store(out_ptr + 4 * out_stride_value, (base - target) * scale, mask=inside)
        weighted = load_splits(partials_ptr + 2 * value_stride, rows, n, splits, 0.0, SPLITS)
        mean = tl.div_rn(tl.sum(carry_base2(weighted, totals, step, factor), 0), total)
        tl.store(out_ptr + out_stride_value, log_total - mean * LN2, mask=inside)


@score_kernel
def merge_reverse_kl_kernel(
    # data
    partials_ptr: tl.tensor,  # [6, splits, n]
    targets_ptr: tl.tensor,  # [n], or None without tokens
    tokens_ptr: tl.tensor,  # [n] or None
    out_ptr: tl.tensor,  # [2, n]
    scale: tl.tensor,
    scale_t: tl.tensor,
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    splits: tl.tensor,
    # strides
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    # constants
    SPLITS: tl.constexpr,  # a power of two
    BLOCK_M: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n
    value_stride = splits.to(tl.int64) * n
    base, step, factor = _merged_max(partials_ptr, rows, n, splits, scale, SPLITS)
    _, step_t, factor_t = _merged_max(partials_ptr + 2 * value_stride, rows, n, splits, scale_t, SPLITS)
    totals = load_splits(partials_ptr + value_stride, rows, n, splits, 0.0, SPLITS)
    totals_t = load_splits(partials_ptr + 3 * value_stride, rows, n, splits, 0.0, SPLITS)
    weighted = load_splits(partials_ptr + 4 * value_stride, rows, n, splits, 0.0, SPLITS)
    lost = load_splits(partials_ptr + 5 * value_stride, rows, n, splits, float("-inf"), SPLITS)
    total = tl.sum(totals * factor, 0)
    mean = tl.div_rn(tl.sum(carry_base2(weighted, totals, step - step_t, factor), 0), total)
    mean += tl.where(tl.exp2((tl.max(lost, 0) - base) * (scale * LOG2E)) > 0.0, float("inf"), 0.0)
    out_ptr += rows * out_stride_row
    tl.store(out_ptr, mean * LN2 - tl.log(tl.div_rn(total, tl.sum(totals_t * factor_t, 0))), mask=inside)
    nll = tl.zeros([BLOCK_M], tl.float32)
    if tokens_ptr is not None:
        target = load_targets(targets_ptr, load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride), rows)
        nll = (base - target) * scale + tl.log(total)
    tl.store(out_ptr + out_stride_value, nll, mask=inside)


@triton.jit
def load_targets(targets_ptr: tl.tensor, y: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """s[y]; NaN where there is no such token, y = −1."""
    return tl.load(targets_ptr + rows, mask=y >= 0, other=float("nan"))


@triton.jit
def load_splits(
    partials_ptr: tl.tensor, rows: tl.tensor, n: tl.tensor, splits: tl.tensor, other: float, SPLITS: tl.constexpr
) -> tl.tensor:
    """One partial value of `rows` [SPLITS, rows]; `other` beyond the last split."""
    split = tl.arange(0, SPLITS)[:, None]
    inside = (split < splits) & (rows < n)[None, :]
    return tl.load(partials_ptr + split.to(tl.int64) * n + rows[None, :], mask=inside, other=other)


@triton.jit
def _merged_max(
    partials_ptr: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    splits: tl.tensor,
    scale: tl.tensor,
    SPLITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """m' over all splits, or 0; d = c (m − m') of each split; 2^d."""
    m = load_splits(partials_ptr, rows, n, splits, float("-inf"), SPLITS)
    base = finite_or_zero(tl.max(m, 0))
    step = tl.where(m == float("-inf"), 0.0, (m - base[None, :]) * (scale * LOG2E))
    return base, step, tl.exp2(step)
