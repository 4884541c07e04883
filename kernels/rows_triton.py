"""Row functions in Triton: the interface of `rows_torch.py`, one program per row, for CUDA and HIP devices.

A program walks its row in blocks of BLOCK logits: once to gather everything the values need, and once more, if a gradient
is wanted, to write it, over the row or elsewhere. With m the largest logit and a = z − m (so that e^a ≤ 1), for the
student and, with subscript t, for the teacher:

    l = Σ e^a                         lse = m + log l           p = e^a / l
    token_nll                         out[0] = (m − z[y]) + log l
                                      gradient p − 1[y]
    reverse_kl   δ = a − a_t          log p − log q = δ − log(l / l_t)
                 mean = Σ e^a δ / l   out[0] = mean − log(l / l_t)
                                      gradient p (log p − log q − out[0]) = p (δ − mean)

Written this way logits of any common size cancel before anything is rounded, and equal logits give δ = 0 and l = l_t
exactly, hence a divergence of exactly 0. m is not known beforehand: when a block raises it from m to m', and m_t to m_t',
what was summed is carried over by

    l ← e^(m − m') l                  Σ e^a δ ← e^(m − m') (Σ e^a δ + c l),   c = (m − m') − (m_t − m_t')

A soft-cap, z = cap · tanh(x), is applied after each load, and dz/dx = (cap − z)(cap + z) / cap before the store.

The rules of `rows_torch` at the edges: a token with z = −inf or p = 0 adds nothing; one with p > 0 and z_t = −inf makes the
divergence +inf; NaN, +inf and rows of nothing but −inf end in NaN. Where `rows_torch` hits a device-side assertion, for
a token id outside the vocabulary, the row becomes NaN here.

One program per row fills a GPU from about two rows per multiprocessor on; the driver's chunks have 1024 and more. Sums are
taken per lane and then in a tree, without atomics: the same row gives the same bits, whatever rows surround it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.rows import Logits

DTYPES = (torch.float32, torch.bfloat16)  # of a chunk; arithmetic is float32
GRADIENT_DTYPES = (*DTYPES, torch.float16)


class LaunchConfig(NamedTuple):
    block: int  # logits of one chunk that a program holds at a time
    num_warps: int


def launch_config(chunks: int) -> LaunchConfig:
    """The shape of a program that reads rows of `chunks` chunks: 1, or 2 with a teacher.

    A rule, not an autotuner: the order of sums, and with it the bits of a loss, must not depend on a timing; nor on the
    width of the rows, of which the last block alone may be partly empty. A thread (of warps of 32) has 8 logits, 32 bytes,
    in flight, shared between the chunks. With more, some variant spills; with these none needs more than 64 registers, so
    that two programs or more share a multiprocessor and one loads while another waits at a reduction.
    """
    num_warps = 16
    return LaunchConfig(8 * 32 * num_warps // chunks, num_warps)


def token_nll(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = lse(z) − z[y]; gradient p − 1[y]."""
    assert tokens is not None
    x = logits.student
    _check_chunk(x, DTYPES)
    if gradient is not None:
        _check_chunk(gradient, GRADIENT_DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=1)
    with _launch_on(x):
        _token_nll_kernel[(n,)](
            # data
            x,
            tokens,
            out,
            gradient,
            1.0 if logits.student_cap is None else logits.student_cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            tokens.stride(0),
            out.stride(1),
            0 if gradient is None else gradient.stride(0),
            # constants
            CAPPED=logits.student_cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


def reverse_kl(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = Σ p (log p − log q), gradient p (log p − log q − out[0]); out[1] = −log p[y], 0 without tokens.

    The teacher's chunk is left as it is, and the student's where the gradient has a place of its own.
    """
    assert logits.teacher is not None
    x, x_t = logits.student, logits.teacher
    _check_chunk(x, DTYPES)
    _check_chunk(x_t, DTYPES)
    if gradient is not None:
        _check_chunk(gradient, GRADIENT_DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=2)
    with _launch_on(x):
        _reverse_kl_kernel[(n,)](
            # data
            x,
            x_t,
            tokens,
            out,
            gradient,
            1.0 if logits.student_cap is None else logits.student_cap,
            1.0 if logits.teacher_cap is None else logits.teacher_cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            x_t.stride(0),
            0 if tokens is None else tokens.stride(0),
            out.stride(0),
            out.stride(1),
            0 if gradient is None else gradient.stride(0),
            # constants
            CAPPED=logits.student_cap is not None,
            CAPPED_T=logits.teacher_cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


def token_nll_entropy(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = −log p[y], out[1] = H = −Σ p log p, out[2] = m = max z, out[3] = lse(z) − m. The chunk stays."""
    assert tokens is not None
    assert gradient is None, "entropy_gradient makes it, once the weights are known"
    x = logits.student
    _check_chunk(x, DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=1)
    with _launch_on(x):
        _nll_entropy_kernel[(n,)](
            # data
            x,
            tokens,
            out,
            1.0 if logits.student_cap is None else logits.student_cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            tokens.stride(0),
            out.stride(0),
            out.stride(1),
            # constants
            CAPPED=logits.student_cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


def entropy_gradient(logits: Logits, tokens: Tensor, out: Tensor, weights: Tensor, gradient: Tensor) -> None:
    """w₀ (p − 1[y]) − w₁ p (log p + H), the gradient of w₀ out[0] + w₁ out[1]; weights [2, n]."""
    x = logits.student
    _check_chunk(gradient, GRADIENT_DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=1)
    weights = weights.contiguous()
    with _launch_on(x):
        _entropy_gradient_kernel[(n,)](
            # data
            x,
            tokens,
            out,
            weights,
            gradient,
            1.0 if logits.student_cap is None else logits.student_cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            tokens.stride(0),
            out.stride(0),
            out.stride(1),
            weights.stride(0),
            gradient.stride(0),
            # constants
            CAPPED=logits.student_cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


def tail_sums(x: Tensor, cap: float | None, out: Tensor) -> None:
    """out[0] = m = max z, out[1] = Σ exp(z − m) (`top_k.TailFunctions`)."""
    _check_chunk(x, DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=1)
    with _launch_on(x):
        _tail_sums_kernel[(n,)](
            # data
            x,
            out,
            1.0 if cap is None else cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            out.stride(0),
            # constants
            CAPPED=cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


def tail_gradient(x: Tensor, cap: float | None, m: Tensor, scale: Tensor, gradient: Tensor) -> None:
    """gradient = scale exp(z − m) dz/dx (`top_k.TailFunctions`)."""
    _check_chunk(x, DTYPES)
    _check_chunk(gradient, GRADIENT_DTYPES)
    n, vocabulary = x.shape
    if n == 0:
        return
    block, num_warps = launch_config(chunks=1)
    with _launch_on(x):
        _tail_gradient_kernel[(n,)](
            # data
            x,
            m.contiguous(),
            scale.contiguous(),
            gradient,
            1.0 if cap is None else cap,
            # shapes
            vocabulary,
            # strides
            x.stride(0),
            gradient.stride(0),
            # constants
            CAPPED=cap is not None,
            BLOCK=block,
            num_warps=num_warps,
        )


# Of what varies from call to call only the width and the distance of rows are specialised, on being multiples of 16: that
# is what vectorised loads need, and it is a property of the model. Nothing is compiled again for another chunk.
@triton.jit(
    do_not_specialize=["tokens_stride", "out_stride_row"],
    do_not_specialize_on_alignment=["tokens_ptr", "out_ptr"],
)
def _token_nll_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [1, n]
    u_ptr: tl.tensor,  # [n, V], the gradient: x itself or apart from it; or None
    cap: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    if u_ptr is not None:
        u_ptr += row * u_stride_row
    y = tl.load(tokens_ptr + row * tokens_stride)
    target = _load_one(x_ptr, y, vocabulary, cap, CAPPED)

    m = float("-inf")
    l_lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z = _load_block(x_ptr, start + tl.arange(0, BLOCK), vocabulary, cap, CAPPED)
        m, base, step = _raise_max(m, z)
        l_lanes = tl.fma(l_lanes, tl.exp(step), tl.exp(z - base))
    base = _finite_or_zero(m)
    total = tl.sum(l_lanes, 0)
    tl.store(out_ptr + row * out_stride_row, (base - target) + tl.log(total))

    if u_ptr is not None:
        scale = tl.where(target == target, tl.div_rn(1.0, total), target)  # NaN if there is no such token
        last = (vocabulary - 1) // BLOCK * BLOCK
        for done in range(0, vocabulary, BLOCK):  # from the end: what was read last is still in the L2 cache
            columns = last - done + tl.arange(0, BLOCK)
            z = _load_block(x_ptr, columns, vocabulary, cap, CAPPED)
            u = tl.exp(z - base) * scale - tl.where(columns == y.to(tl.int32), 1.0, 0.0)
            _store_gradient(u_ptr, columns, vocabulary, u, z, cap, CAPPED)


@triton.jit(
    do_not_specialize=["tokens_stride", "out_stride_value", "out_stride_row"],
    do_not_specialize_on_alignment=["tokens_ptr", "out_ptr"],
)
def _reverse_kl_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_t_ptr: tl.tensor,  # [n, V]
    tokens_ptr: tl.tensor,  # [n] or None
    out_ptr: tl.tensor,  # [2, n]
    u_ptr: tl.tensor,  # [n, V], the gradient: x itself or apart from it; or None
    cap: tl.tensor,
    cap_t: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    x_t_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    CAPPED_T: tl.constexpr,
    BLOCK: tl.constexpr,  # logits of each chunk held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    if u_ptr is not None:
        u_ptr += row * u_stride_row
    x_t_ptr += row * x_t_stride_row
    out_ptr += row * out_stride_row
    if tokens_ptr is not None:
        target = _load_one(x_ptr, tl.load(tokens_ptr + row * tokens_stride), vocabulary, cap, CAPPED)

    m = float("-inf")
    m_t = float("-inf")
    l_lanes = tl.zeros([BLOCK], tl.float32)
    l_t_lanes = tl.zeros([BLOCK], tl.float32)
    weighted_lanes = tl.zeros([BLOCK], tl.float32)  # Σ e^a δ
    lost_lanes = tl.full([BLOCK], float("-inf"), tl.float32)  # the largest z among tokens that the teacher cannot emit
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load_block(x_ptr, columns, vocabulary, cap, CAPPED)
        z_t = _load_block(x_t_ptr, columns, vocabulary, cap_t, CAPPED_T)
        m, base, step = _raise_max(m, z)
        m_t, base_t, step_t = _raise_max(m_t, z_t)
        e = tl.exp(z - base)
        factor = tl.exp(step)
        carried = (weighted_lanes + l_lanes * (step - step_t)) * factor
        weighted_lanes = tl.where(factor > 0.0, carried, 0.0) + e * _difference(z - base, z_t - base_t)
        l_lanes = tl.fma(l_lanes, factor, e)
        l_t_lanes = tl.fma(l_t_lanes, tl.exp(step_t), tl.exp(z_t - base_t))
        lost_lanes = tl.maximum(lost_lanes, tl.where(z_t == float("-inf"), z, float("-inf")))
    base = _finite_or_zero(m)
    base_t = _finite_or_zero(m_t)
    total = tl.sum(l_lanes, 0)
    scale = tl.div_rn(1.0, total)
    lost = tl.exp(tl.max(lost_lanes, 0) - base) * scale
    mean = tl.div_rn(tl.sum(weighted_lanes, 0), total) + tl.where(lost > 0.0, float("inf"), 0.0)
    tl.store(out_ptr, mean - tl.log(tl.div_rn(total, tl.sum(l_t_lanes, 0))))
    if tokens_ptr is not None:
        tl.store(out_ptr + out_stride_value, (base - target) + tl.log(total))
    else:
        tl.store(out_ptr + out_stride_value, 0.0)

    if u_ptr is not None:
        last = (vocabulary - 1) // BLOCK * BLOCK
        for done in range(0, vocabulary, BLOCK):  # from the end: what was read last is still in the L2 cache
            columns = last - done + tl.arange(0, BLOCK)
            z = _load_block(x_ptr, columns, vocabulary, cap, CAPPED)
            z_t = _load_block(x_t_ptr, columns, vocabulary, cap_t, CAPPED_T)
            u = tl.exp(z - base) * scale * (_difference(z - base, z_t - base_t) - mean)
            _store_gradient(u_ptr, columns, vocabulary, u, z, cap, CAPPED)


@triton.jit(
    do_not_specialize=["tokens_stride", "out_stride_value", "out_stride_row"],
    do_not_specialize_on_alignment=["tokens_ptr", "out_ptr"],
)
def _nll_entropy_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [4, n]
    cap: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    out_ptr += row * out_stride_row
    target = _load_one(x_ptr, tl.load(tokens_ptr + row * tokens_stride), vocabulary, cap, CAPPED)

    m = float("-inf")
    l_lanes = tl.zeros([BLOCK], tl.float32)
    weighted_lanes = tl.zeros([BLOCK], tl.float32)  # Σ e^a a
    for start in range(0, vocabulary, BLOCK):
        z = _load_block(x_ptr, start + tl.arange(0, BLOCK), vocabulary, cap, CAPPED)
        m, base, step = _raise_max(m, z)
        a = z - base
        e, factor = tl.exp(a), tl.exp(step)
        carried = tl.where(factor > 0.0, (weighted_lanes + l_lanes * step) * factor, 0.0)
        weighted_lanes = carried + e * tl.where(a == float("-inf"), 0.0, a)
        l_lanes = tl.fma(l_lanes, factor, e)
    base = _finite_or_zero(m)
    total = tl.sum(l_lanes, 0)
    log_total = tl.log(total)
    tl.store(out_ptr, (base - target) + log_total)
    tl.store(out_ptr + out_stride_value, log_total - tl.div_rn(tl.sum(weighted_lanes, 0), total))
    tl.store(out_ptr + 2 * out_stride_value, base)
    tl.store(out_ptr + 3 * out_stride_value, log_total)


@triton.jit(
    do_not_specialize=["tokens_stride", "out_stride_value", "out_stride_row", "weights_stride_value"],
    do_not_specialize_on_alignment=["tokens_ptr", "out_ptr", "weights_ptr"],
)
def _entropy_gradient_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [4, n]: −log p[y], H, m, lse − m
    weights_ptr: tl.tensor,  # [2, n]
    u_ptr: tl.tensor,  # [n, V], x itself or apart from it
    cap: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    weights_stride_value: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    u_ptr += row * u_stride_row
    out_ptr += row * out_stride_row
    y = tl.load(tokens_ptr + row * tokens_stride).to(tl.int32)
    nll = tl.load(out_ptr)
    entropy = tl.load(out_ptr + out_stride_value)
    base = tl.load(out_ptr + 2 * out_stride_value)
    log_total = tl.load(out_ptr + 3 * out_stride_value)
    w_nll = tl.where(nll == nll, tl.load(weights_ptr + row), nll)  # NaN if there is no such token
    w_entropy = tl.load(weights_ptr + weights_stride_value + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load_block(x_ptr, columns, vocabulary, cap, CAPPED)
        log_p = (z - base) - log_total  # in this order: large logits cancel before anything is rounded
        p = tl.exp(log_p)
        log_p = tl.where(z == float("-inf"), 0.0, log_p)
        u = p * (w_nll - w_entropy * (log_p + entropy)) - tl.where(columns == y, w_nll, 0.0)
        _store_gradient(u_ptr, columns, vocabulary, u, z, cap, CAPPED)


@triton.jit(do_not_specialize=["out_stride_value"], do_not_specialize_on_alignment=["out_ptr"])
def _tail_sums_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]; what is −inf is left out
    out_ptr: tl.tensor,  # [2, n]
    cap: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    out_stride_value: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    m = float("-inf")
    l_lanes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        z = _load_entries(x_ptr, start + tl.arange(0, BLOCK), vocabulary, cap, CAPPED)
        m, base, step = _raise_max(m, z)
        l_lanes = tl.fma(l_lanes, tl.exp(step), tl.exp(z - base))
    tl.store(out_ptr + row, m)
    tl.store(out_ptr + out_stride_value + row, tl.sum(l_lanes, 0))


@triton.jit(do_not_specialize_on_alignment=["m_ptr", "scale_ptr"])
def _tail_gradient_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]; what is −inf is left out
    m_ptr: tl.tensor,  # [n]
    scale_ptr: tl.tensor,  # [n]
    u_ptr: tl.tensor,  # [n, V], x itself or apart from it
    cap: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    u_ptr += row * u_stride_row
    base, scale = _finite_or_zero(tl.load(m_ptr + row)), tl.load(scale_ptr + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = _load_entries(x_ptr, columns, vocabulary, cap, CAPPED)
        u = scale * tl.exp(z - base)
        _store_gradient(u_ptr, columns, vocabulary, u, tl.where(z == float("-inf"), 0.0, z), cap, CAPPED)


@triton.jit
def _load_block(
    x_ptr: tl.tensor, columns: tl.tensor, vocabulary: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    """The logits z at `columns`; −inf beyond the vocabulary."""
    inside = columns < vocabulary
    z = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if CAPPED:
        z = tl.where(inside, cap * _tanh(z), float("-inf"))
    return z


@triton.jit
def _load_entries(
    x_ptr: tl.tensor, columns: tl.tensor, vocabulary: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    """The logits z at `columns`; −inf beyond the vocabulary and where x is −inf, which a cap would bring back."""
    x = tl.load(x_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
    if CAPPED:
        x = tl.where(x == float("-inf"), x, cap * _tanh(x))
    return x


@triton.jit
def _load_one(x_ptr: tl.tensor, y: tl.tensor, vocabulary: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """The logit of token y; NaN if there is no such token."""
    z = tl.load(x_ptr + y, mask=(y >= 0) & (y < vocabulary), other=float("nan")).to(tl.float32)
    if CAPPED:
        z = cap * _tanh(z)
    return z


@triton.jit
def _store_gradient(
    u_ptr: tl.tensor,
    columns: tl.tensor,
    vocabulary: tl.tensor,
    u: tl.tensor,
    z: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
) -> None:
    """Stores u · dz/dx at `columns`."""
    if CAPPED:
        u *= (cap - z) * (cap + z) * (1.0 / cap)
    tl.store(u_ptr + columns, u, mask=columns < vocabulary)


@triton.jit
def _raise_max(m: tl.tensor, z: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """m' = max(m, max z); what to subtract from logits for it, m'; and m − m'. Both 0 while nothing finite was seen."""
    raised = tl.maximum(m, tl.max(z, 0))
    base = _finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, m - base)


@triton.jit
def _finite_or_zero(m: tl.tensor) -> tl.tensor:
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _difference(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a − b; 0 for a token that the student cannot emit, and for one that the teacher cannot, counted as `lost`."""
    return tl.where((a == float("-inf")) | (b == float("-inf")), 0.0, a - b)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


def _check_chunk(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f'the Triton row functions need a CUDA or HIP device and the chunk is on {x.device}: pass backend="torch" '
            "(fastkl.kernels.rows_torch) there"
        )
    if x.dtype not in dtypes:
        raise TypeError(
            f"the Triton row functions take chunks of {' or '.join(str(d) for d in dtypes)}, not {x.dtype}: pass "
            f'backend="torch" (fastkl.kernels.rows_torch)'
        )
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"the logits of a row must lie side by side; the chunk has strides {x.stride()}")


def _launch_on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the chunk's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
