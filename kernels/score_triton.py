"""Values straight from hidden states and the weight of the LM head, in Triton: no logits in memory.

A program multiplies a tile of rows with one tile of the vocabulary after the other and reduces each product while it is
in registers. The score of a token is kept as s = h·w + b, or tanh(alpha (h·w + b)) where the head has a soft-cap, so
that z = scale · s with scale = alpha > 0, or cap. With m the largest s so far, in units of log 2 (c = scale · log₂ e),
and, with subscript t, for the teacher:

    a = c (s − m)                     l = Σ 2^a         p = 2^a / l       lse = scale · m + log l
    token_nll    out[0] = scale (m − s[y]) + log l
                 out[1] = log l − log 2 · Σ 2^a a / l                     the entropy, lse − Σ p z
    reverse_kl   δ = a − a_t          out[0] = log 2 · Σ 2^a δ / l − log(l / l_t)
                                      out[1] = scale (m − s[y]) + log l

When a tile raises m to m', what was summed is carried over as in `rows_triton`, with x = a or x = δ:

    l ← 2^d l            Σ 2^a x ← 2^d (Σ 2^a x + l d_x)            d = c (m − m'),   d_x = d or d − d_t

Equal student and teacher give a = a_t and l = l_t, bit for bit, hence a divergence of exactly 0: multiplications and
additions are contracted only where `fma` says so. The rules at the edges are those of `rows_triton`, NaN for a token id
outside the vocabulary included, with one difference: 2^a is 0 below 2^−126, and a token with 2^a = 0 is impossible.

Same bits for a row wherever it stands: the vocabulary is cut into at most MAX_SPLITS splits, by V and the launch
configuration alone. A program owns one tile of rows and one split, and leaves K sums per row (2 for token_nll, 3 with
the entropy, 6 for reverse_kl); a second kernel merges the splits of a row, always in the same tree. No atomics, no
locks. The sums and s[y] take 4 n (K · splits + 1) bytes: 8.4 MB for token_nll and 25 MB for reverse_kl at n = 8192, V =
262144.

Schedule. Programs start in the order of their index: all splits of a group of row tiles, then the next group. In a
group the row tiles of one split are neighbours, so that they want the same piece of the weight at about the same time,
and the hidden states of a group, at most GROUP_BYTES, stay in the L2 cache while the weight goes by once per group. At
N, D, V = 8192, 4096, 151936 in bf16 a group is 16 tiles of 128 rows: the weight is read from memory 4 times and the
hidden states once, 5.0 GB, or 1.2 ms of an H200 beside 12.9 ms of multiplication (10.2 TFLOP). A split is a single
software pipeline over its tiles and the steps of D in them (`flatten`): the operands of the next tile arrive while the
last one is reduced. There are far more programs than multiprocessors (7616 there) and each runs long, so the hardware's
queue stands in for a persistent loop.

Cost over a plain GEMM at that shape on sm_90, by counting: reducing a tile of 128 × 256 takes some 1030 instructions
per warp, about 3000 cycles beside the 65536 in which the tensor cores make it: 5 %, twice that at D = 2048. They idle
meanwhile. Starting and filling a program is about 1 % of its 5 tiles, and the last wave of programs leaves 0.5 % empty.
Nothing of the 2.5 GB that a GEMM writes in bf16 is written. That leaves 8 % for the multiplication itself if the whole
is to stay within 1.15 of the vendor's. Its steps read 119 GB from the L2 cache at that shape, 9 TB/s at full speed;
vendor kernels share tiles between neighbouring multiprocessors, which Triton does not, so this is what may cost it. No
figure here is measured. To tune on an H200, in this order: GROUP_BYTES (8 to 32 MiB), num_stages 3 against 4, two
programs of 128 × 128 with 4 warps per multiprocessor, one of which multiplies while the other reduces, and MAX_SPLITS
(which changes the bits).

float32 operands are multiplied without tensor cores, exactly as float32: right but slow, vendor GEMMs are the better
choice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastkl.kernels.problem import HeadOptions

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the operands; accumulators are float32
MAX_SPLITS = 128  # of the vocabulary
GROUP_BYTES = 16 * 2**20  # of hidden states that stay in the L2 cache while the weight goes by
MERGED_ROWS = 16  # rows of a program that merges splits

# How operands are read: by tensor descriptors (TMA), by pointers 16 bytes at a time, or one element at a time. It follows
# from D and the distance of rows, as long as tensors start at multiples of 16 bytes.
Access = Literal["descriptors", "vectors", "scalars"]


class Head(NamedTuple):
    """Hidden states and what they are projected with."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D], dtype of the hidden states
    bias: Tensor | None  # [V]
    options: HeadOptions


class LaunchConfig(NamedTuple):
    block_m: int  # rows of a tile
    block_n: int  # columns of the vocabulary of a tile
    block_k: int  # of D, per step
    num_warps: int
    num_stages: int  # steps whose operands are on their way or in use


def launch_config(
    target: GPUTarget, dtype: torch.dtype, access: Access, heads: int, bias: bool, capped: bool
) -> LaunchConfig:
    """The shape of a program for operands of `dtype`, two `heads` with a teacher.

    A rule, not an autotuner, and blind to n: the order of sums, and with it the bits of a value, must depend neither on
    a timing nor on the batch. Tiles are the widest of which no variant spills registers; a bias takes some for each column.
    """
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 16, 8, 2)
    if access == "scalars":
        return LaunchConfig(64, 64, 32, 8, 1)
    if target.backend == "hip":
        return LaunchConfig(128, 64 if capped or heads == 2 else 128, 64, 8, 2)
    if target.arch // 10 == 10:
        return LaunchConfig(128, 128 // heads, 64, 8, 6 if access == "descriptors" else 4)
    if target.arch // 10 == 9:
        narrow = bias or access == "vectors"
        return LaunchConfig(128, (128 if narrow else 256) // heads, 64, 8, 4)
    return LaunchConfig(128, 128 // heads, 32, 8, 4)


def splits(vocabulary: int, block_n: int) -> tuple[int, int]:
    """(splits, columns of each): a function of the vocabulary, so that the bits of a row do not depend on n."""
    tiles = triton.cdiv(vocabulary, block_n)
    tiles_each = triton.cdiv(tiles, MAX_SPLITS)
    return triton.cdiv(tiles, tiles_each), tiles_each * block_n


def token_nll(head: Head, tokens: Tensor, out: Tensor, entropy: bool = False) -> None:
    """out[0] = lse(z) − z[y]; with `entropy`, out[1] = lse(z) − Σ p z."""
    _check_head(head)
    hidden, weight, bias, options = head
    n, vocabulary = hidden.shape[0], weight.shape[0]
    if n == 0:
        return
    access, config = _plan([head])
    count, width = splits(vocabulary, config.block_n)
    partials = torch.empty(3 if entropy else 2, count, n, dtype=torch.float32, device=hidden.device)
    targets = torch.empty(n, dtype=torch.float32, device=hidden.device)
    capped, alpha, scale = _scales(options)
    with _launch_on(hidden):
        _token_nll_kernel[_grid(n, count, config)](
            # data
            *_operands(head, access, config),
            bias,
            tokens,
            partials,
            targets,
            alpha,
            scale,
            # shapes
            n,
            vocabulary,
            hidden.shape[1],
            count,
            width,
            _group([head], config),
            # strides
            hidden.stride(0),
            weight.stride(0),
            tokens.stride(0),
            # constants
            CAPPED=capped,
            ENTROPY=entropy,
            EVEN_K=hidden.shape[1] % config.block_k == 0,
            TMA=access == "descriptors",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        _merge_token_nll_kernel[(triton.cdiv(n, MERGED_ROWS),)](
            # data
            partials,
            targets,
            tokens,
            out,
            scale,
            # shapes
            n,
            vocabulary,
            count,
            # strides
            tokens.stride(0),
            out.stride(0),
            out.stride(1),
            # constants
            ENTROPY=entropy,
            SPLITS=triton.next_power_of_2(count),
            BLOCK_M=MERGED_ROWS,
            enable_fp_fusion=False,
        )


def reverse_kl(student: Head, teacher: Head, tokens: Tensor | None, out: Tensor) -> None:
    """out[0] = Σ p (log p − log q); out[1] = −log p[y], 0 without tokens."""
    _check_head(student)
    _check_head(teacher)
    hidden, hidden_t = student.hidden, teacher.hidden
    n, vocabulary = hidden.shape[0], student.weight.shape[0]
    if (hidden_t.shape[0], teacher.weight.shape[0]) != (n, vocabulary):
        raise ValueError(
            f"student and teacher must have the same rows and vocabulary: {n} and {vocabulary} for the student, "
            f"{hidden_t.shape[0]} and {teacher.weight.shape[0]} for the teacher"
        )
    if n == 0:
        return
    access, config = _plan([student, teacher])
    count, width = splits(vocabulary, config.block_n)
    partials = torch.empty(6, count, n, dtype=torch.float32, device=hidden.device)
    targets = None if tokens is None else torch.empty(n, dtype=torch.float32, device=hidden.device)
    capped, alpha, scale = _scales(student.options)
    capped_t, alpha_t, scale_t = _scales(teacher.options)
    with _launch_on(hidden):
        _reverse_kl_kernel[_grid(n, count, config)](
            # data
            *_operands(student, access, config),
            student.bias,
            *_operands(teacher, access, config),
            teacher.bias,
            tokens,
            partials,
            targets,
            alpha,
            scale,
            alpha_t,
            scale_t,
            # shapes
            n,
            vocabulary,
            hidden.shape[1],
            hidden_t.shape[1],
            count,
            width,
            _group([student, teacher], config),
            # strides
            hidden.stride(0),
            student.weight.stride(0),
            hidden_t.stride(0),
            teacher.weight.stride(0),
            0 if tokens is None else tokens.stride(0),
            # constants
            CAPPED=capped,
            CAPPED_T=capped_t,
            EVEN_K=hidden.shape[1] % config.block_k == 0,
            EVEN_K_T=hidden_t.shape[1] % config.block_k == 0,
            TMA=access == "descriptors",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        _merge_reverse_kl_kernel[(triton.cdiv(n, MERGED_ROWS),)](
            # data
            partials,
            targets,
            tokens,
            out,
            scale,
            scale_t,
            # shapes
            n,
            vocabulary,
            count,
            # strides
            0 if tokens is None else tokens.stride(0),
            out.stride(0),
            out.stride(1),
            # constants
            SPLITS=triton.next_power_of_2(count),
            BLOCK_M=MERGED_ROWS,
            enable_fp_fusion=False,
        )


# Of what varies from call to call nothing is specialised, hence nothing compiled again; V, D and the distances of rows are,
# on being multiples of 16: these are properties of a model.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["n", "splits", "width", "group", "tokens_stride"],
    do_not_specialize_on_alignment=["tokens_ptr", "partials_ptr", "targets_ptr"],
)
def _token_nll_kernel(
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
def _reverse_kl_kernel(
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
def _merge_token_nll_kernel(
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
def _merge_reverse_kl_kernel(
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
    base = _finite_or_zero(tl.max(m, 0))
    step = tl.where(m == float("-inf"), 0.0, (m - base[None, :]) * (scale * LOG2_E))
    return base, step, tl.exp2(step)


@triton.jit
def _raise_max(m: tl.tensor, s: tl.tensor, scale: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """m' = max(m, max s); what to subtract from scores for it, m'; and d. The last two are 0 while nothing was possible."""
    raised = tl.maximum(m, tl.max(s, 1))
    base = _finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, (m - base) * (scale * LOG2_E))


@triton.jit
def _finite_or_zero(m: tl.tensor) -> tl.tensor:
    return tl.where(m == float("-inf"), 0.0, m)


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


def _plan(heads: list[Head]) -> tuple[Access, LaunchConfig]:
    target = _target()
    operands = [t for head in heads for t in (head.hidden, head.weight)]
    access: Access = "scalars"
    if target.backend == "cuda" and target.arch // 10 in (9, 10) and all(map(_suits_descriptors, operands)):
        access = "descriptors"
    elif all(map(_suits_vectors, operands)):
        access = "vectors"
    dtype = torch.float32 if torch.float32 in [t.dtype for t in operands] else operands[0].dtype
    bias = any(head.bias is not None for head in heads)
    capped = any(head.options.cap is not None for head in heads)
    return access, launch_config(target, dtype, access, len(heads), bias, capped)


def _suits_descriptors(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1] > 0


def _suits_vectors(t: Tensor) -> bool:
    """Triton sees the alignment of a number of elements from 16 on."""
    return t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0


def _operands(
    head: Head, access: Access, config: LaunchConfig
) -> tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]:
    hidden, weight = head.hidden, head.weight
    if access != "descriptors":
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def _grid(n: int, splits: int, config: LaunchConfig) -> tuple[int]:
    return (triton.cdiv(n, config.block_m) * splits,)


def _group(heads: list[Head], config: LaunchConfig) -> int:
    """Row tiles of a group."""
    row_bytes = sum(head.hidden.shape[1] * head.hidden.itemsize for head in heads)
    return max(1, GROUP_BYTES // max(1, config.block_m * row_bytes))


def _scales(options: HeadOptions) -> tuple[bool, float, float]:
    """Whether there is a cap, alpha, and scale."""
    return options.cap is not None, options.alpha, options.alpha if options.cap is None else options.cap


def _target() -> GPUTarget:
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 80, 32)
    return triton.runtime.driver.active.get_current_target()


def _check_head(head: Head) -> None:
    hidden, weight = head.hidden, head.weight
    if not hidden.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"the Triton scoring kernels need a CUDA or HIP device; the hidden states are on {hidden.device}"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            "the Triton scoring kernels take hidden states and weight of one dtype, bfloat16, float16 or float32, "
            f"not {hidden.dtype} and {weight.dtype}"
        )
    for name, t in (("hidden states", hidden), ("weight", weight)):
        if t.stride(1) != 1 and t.shape[1] > 1:
            raise ValueError(f"the elements of a row of the {name} must lie side by side; the strides are {t.stride()}")


def _launch_on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the operands'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
