"""The kernels of `score_triton.py`, where the formulas and the schedule are.

A kernel multiplies and reduces one split of the vocabulary for one tile of rows; another merges the splits of a row. Of
what varies from call to call nothing is specialised, hence nothing compiled again; V, D and the distances of rows are, on
being multiples of 16: these are properties of a model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels.rows.launch import finite_or_zero

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["n", "splits", "width", "group", "tokens_stride"],
    do_not_specialize_on_alignment=["tokens_ptr", "partials_ptr", "targets_ptr"],
)
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
    y = _load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)  # Σ 2^a a
    for start in tl.range(split * width, min((split + 1) * width, vocabulary), BLOCK_N, flatten=True):
        s = _scores(
            h, w, bias_ptr, alpha, first_row, start, n, vocabulary, dim, h_stride_row, w_stride_row,
            CAPPED, EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store_targets(targets_ptr, s, y, rows, start, BLOCK_N)
        m, base, step = _raise_max(m, s, scale)
        a = (s - base[:, None]) * (scale * LOG2_E)
        e = tl.exp2(a)
        factor = tl.exp2(step)
        if ENTROPY:
            carried = _carried(weighted, total, factor, step)
            weighted = carried + tl.sum(tl.where(a == float("-inf"), 0.0, e * a), 1)
        total = tl.fma(total, factor, tl.sum(e, 1))
    partials_ptr += split.to(tl.int64) * n + rows
    value_stride = splits.to(tl.int64) * n
    inside = rows < n
    tl.store(partials_ptr, m, mask=inside)
    tl.store(partials_ptr + value_stride, total, mask=inside)
    if ENTROPY:
        tl.store(partials_ptr + 2 * value_stride, weighted, mask=inside)


@triton.jit(
    do_not_specialize=["n", "splits", "width", "group", "tokens_stride"],
    do_not_specialize_on_alignment=["tokens_ptr", "partials_ptr", "targets_ptr"],
)
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
        y = _load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)

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
        m, base, step = _raise_max(m, s, scale)
        m_t, base_t, step_t = _raise_max(m_t, s_t, scale_t)
        a = (s - base[:, None]) * (scale * LOG2_E)
        a_t = (s_t - base_t[:, None]) * (scale_t * LOG2_E)
        e = tl.exp2(a)
        factor = tl.exp2(step)
        one_sided = (a == float("-inf")) | (a_t == float("-inf"))
        carried = _carried(weighted, total, factor, step - step_t)
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


@triton.jit(
    do_not_specialize=["n", "splits", "tokens_stride", "out_stride_value", "out_stride_row"],
    do_not_specialize_on_alignment=["partials_ptr", "targets_ptr", "tokens_ptr", "out_ptr"],
)
def merge_token_nll_kernel(
    # data
    partials_ptr: tl.tensor,  # [2 or 3, splits, n]
    targets_ptr: tl.tensor,  # [n]
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [1 or 2, n]
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
    totals = _load_splits(partials_ptr + value_stride, rows, n, splits, 0.0, SPLITS)
    total = tl.sum(totals * factor, 0)
    log_total = tl.log(total)
    target = _load_targets(targets_ptr, tokens_ptr, rows, n, vocabulary, tokens_stride)
    out_ptr += rows * out_stride_row
    tl.store(out_ptr, (base - target) * scale + log_total, mask=inside)
    if ENTROPY:
        weighted = _load_splits(partials_ptr + 2 * value_stride, rows, n, splits, 0.0, SPLITS)
        mean = tl.div_rn(tl.sum(_carried(weighted, totals, factor, step), 0), total)
        tl.store(out_ptr + out_stride_value, log_total - mean * LN_2, mask=inside)


@triton.jit(
    do_not_specialize=["n", "splits", "tokens_stride", "out_stride_value", "out_stride_row"],
    do_not_specialize_on_alignment=["partials_ptr", "targets_ptr", "tokens_ptr", "out_ptr"],
)
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
    totals = _load_splits(partials_ptr + value_stride, rows, n, splits, 0.0, SPLITS)
    totals_t = _load_splits(partials_ptr + 3 * value_stride, rows, n, splits, 0.0, SPLITS)
    weighted = _load_splits(partials_ptr + 4 * value_stride, rows, n, splits, 0.0, SPLITS)
    lost = _load_splits(partials_ptr + 5 * value_stride, rows, n, splits, float("-inf"), SPLITS)
    total = tl.sum(totals * factor, 0)
    mean = tl.div_rn(tl.sum(_carried(weighted, totals, factor, step - step_t), 0), total)
    mean += tl.where(tl.exp2((tl.max(lost, 0) - base) * (scale * LOG2_E)) > 0.0, float("inf"), 0.0)
    out_ptr += rows * out_stride_row
    tl.store(out_ptr, mean * LN_2 - tl.log(tl.div_rn(total, tl.sum(totals_t * factor_t, 0))), mask=inside)
    nll = tl.zeros([BLOCK_M], tl.float32)
    if tokens_ptr is not None:
        target = _load_targets(targets_ptr, tokens_ptr, rows, n, vocabulary, tokens_stride)
        nll = (base - target) * scale + tl.log(total)
    tl.store(out_ptr + out_stride_value, nll, mask=inside)


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
        s = _tanh(s * alpha)
    return tl.where((columns < vocabulary)[None, :], s, float("-inf"))


@triton.jit
def _load_tokens(
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
    found = (y >= start) & (y < start + BLOCK_N)
    if tl.max(found.to(tl.int32), 0) > 0:
        columns = start + tl.arange(0, BLOCK_N)
        target = tl.sum(tl.where(columns[None, :] == y[:, None], s, 0.0), 1)
        tl.store(targets_ptr + rows, target, mask=found)


@triton.jit
def _load_targets(
    targets_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    vocabulary: tl.tensor,
    tokens_stride: tl.tensor,
) -> tl.tensor:
    """s[y]; NaN where there is no such token."""
    y = _load_tokens(tokens_ptr, rows, n, vocabulary, tokens_stride)
    return tl.load(targets_ptr + rows, mask=y >= 0, other=float("nan"))


@triton.jit
def _load_splits(
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
    m = _load_splits(partials_ptr, rows, n, splits, float("-inf"), SPLITS)
    base = finite_or_zero(tl.max(m, 0))
    step = tl.where(m == float("-inf"), 0.0, (m - base[None, :]) * (scale * LOG2_E))
    return base, step, tl.exp2(step)


@triton.jit
def _raise_max(m: tl.tensor, s: tl.tensor, scale: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """m' = max(m, max s); what to subtract from scores for it, m'; and d. The last two are 0 while nothing was possible."""
    raised = tl.maximum(m, tl.max(s, 1))
    base = finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, (m - base) * (scale * LOG2_E))


@triton.jit
def _carried(weighted: tl.tensor, total: tl.tensor, factor: tl.tensor, step: tl.tensor) -> tl.tensor:
    """2^d (Σ 2^a x + l d_x); 0 where nothing of l remains, for d may be infinite there."""
    return tl.where(total * factor > 0.0, factor * tl.fma(total, step, weighted), 0.0)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = tl.fma(s, tl.fma(s, tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0)
    far = tl.where(x < 0.0, -far, far)
    near = tl.fma(x * s, near, x)
    return tl.where(tl.abs(x) < 0.25, near, far)
