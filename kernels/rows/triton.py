"""Log-probs of tokens and entropies in Triton: the interface of `pytorch.py`, in the way of `walk.py`.

With a = z − m, m = max z, l = Σ e^a and p = e^a / l:

    token_nll             out[0] = (r − z[y]) + log l       l = Σ e^(z − r)
                          gradient p − 1[y]
    token_nll_entropy     out[1] = H = log l − Σ e^a a / l     out[2] = m     out[3] = log l     out[4] = m − z[y]
    entropy_gradient      log p = a − log l                    gradient w₀ (p − 1[y]) − w₁ p (log p + H) + w₂ p

`token_nll` takes for r what is known before the walk, the largest of z[y] and the first block. Any r near m is right; where
it is more than FAR off, the walk is made again with m. So the walk itself can write e^(z − r) as a gradient in bf16, which
only lacks the factor 1 / l, and l in the place of 1 at y. That saves a walk, and no digit is lost, for p would be rounded
to bf16.

Of a vocabulary in pieces (`parallel/`), `token_nll` too is made of the values of `token_nll_entropy`, which the processes
merge, and of `entropy_gradient`: what a row needs of other processes must be there before its gradient is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.launch import check_device, launch, token_ids
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_rows, row_config, row_kernel, written_to
from fastkl.kernels.rows.parallel.vocabulary import WHOLE
from fastkl.kernels.rows.walk import (
    carry,
    exp,
    finite_or_zero,
    from_end,
    lane_max,
    lane_sum,
    lanes,
    load_block,
    load_one,
    merge,
    raise_lanes,
    slope_of_cap,
    spread,
    store_block,
    store_gradient,
)

FAR = tl.constexpr(20.0)  # e^FAR costs no sum digits, and no product of u range
LOWEST = tl.constexpr(-1e30)  # times a probability of 0 it is 0


def token_nll(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> Tensor | None:
    """out[0] = lse(z) − z[y]; gradient p − 1[y], where one walk makes it but for a factor of each row, [n]."""
    assert tokens is not None
    if logits.vocabulary is not WHOLE:
        scores, weights = out.new_empty(5, out.shape[1]), out.new_zeros(3, out.shape[1])
        token_nll_entropy(logits, tokens, scores, None)
        out[0] = scores[0]
        if gradient is not None:
            weights[0] = 1.0
            entropy_gradient(logits, tokens, scores, weights, gradient)
        return None
    one_walk = gradient is not None and _takes_one_walk(logits.student, gradient)
    factor = out.new_empty(out.shape[1]) if one_walk else None
    launch_rows(
        _token_nll_kernel,
        logits,
        programs=3 if one_walk else 2,
        **token_ids(tokens),
        **written_to(gradient),
        out_ptr=out,
        out_stride_row=out.stride(1),
        factor_ptr=factor,
    )
    return factor


def token_nll_entropy(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = −log p[y], out[1] = H = −Σ p log p, out[2] = m = max z, out[3] = lse(z) − m, out[4] = m − z[y].

    The chunk stays.
    """
    assert tokens is not None
    assert gradient is None, "entropy_gradient makes it, once the weights are known"
    launch_rows(
        _token_nll_entropy_kernel,
        logits,
        programs=2,
        **token_ids(logits.vocabulary.places(logits.student, tokens)),
        out_ptr=out,
        out_stride_value=out.stride(0),
        out_stride_row=out.stride(1),
    )
    logits.vocabulary.merge_scores(logits.student, tokens, out)


def entropy_gradient(logits: Logits, tokens: Tensor, out: Tensor, weights: Tensor, gradient: Tensor) -> None:
    """w₀ (p − 1[y]) − w₁ p (log p + H) + w₂ p, the gradient of w₀ out[0] + w₁ out[1] + w₂ lse; weights [3, n]."""
    weights = weights.contiguous()
    launch_rows(
        _entropy_gradient_kernel,
        logits,
        **token_ids(logits.vocabulary.places(logits.student, tokens)),
        **written_to(gradient),
        out_ptr=out,
        out_stride_value=out.stride(0),
        out_stride_row=out.stride(1),
        weights_ptr=weights,
        weights_stride_value=weights.stride(0),
    )


def clear_rows(gradient: Tensor, slope: Tensor) -> None:
    """The gradient becomes 0 in the rows whose slope is 0; the others are not touched."""
    check_device("chunk is", gradient)
    launch(
        _clear_rows_kernel,
        (gradient.shape[0],),
        row_config(1),
        gradient.device,
        **written_to(gradient),
        slope_ptr=slope.contiguous(),
        vocabulary=gradient.shape[1],
    )


def _takes_one_walk(chunk: Tensor, gradient: Tensor) -> bool:
    """bf16 reaches as far as float32; logits must survive a bad guess; without vectors, registers do not suffice."""
    apart = gradient.data_ptr() != chunk.data_ptr()
    return apart and gradient.dtype == torch.bfloat16 and chunk.stride(0) % 16 == gradient.stride(0) % 16 == 0


@row_kernel
def _token_nll_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [1, n]
    u_ptr: tl.tensor,  # [n, V], the gradient: x itself or apart from it; or None
    factor_ptr: tl.tensor,  # [n], what u is still to be multiplied by; or None
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
    BLOCK_N: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    if u_ptr is not None:
        u_ptr += row * u_stride_row
    y = tl.load(tokens_ptr + row * tokens_stride)
    target = load_one(x_ptr, x_bias_ptr, y, vocabulary, cap, CAPPED)

    first = load_block(x_ptr, x_bias_ptr, 0, vocabulary, cap, CAPPED, BLOCK_N)
    r = finite_or_zero(tl.maximum(tl.max(first, 0), target))
    m_lanes, l_lanes = _exponentials(x_ptr, x_bias_ptr, u_ptr, factor_ptr, r, vocabulary, cap, CAPPED, BLOCK_N)
    m = tl.max(m_lanes, 0)
    if tl.abs(m - r) > FAR:
        r = finite_or_zero(m)
        m_lanes, l_lanes = _exponentials(x_ptr, x_bias_ptr, u_ptr, factor_ptr, r, vocabulary, cap, CAPPED, BLOCK_N)
    total = tl.sum(l_lanes, 0)
    tl.store(out_ptr + row * out_stride_row, (r - target) + tl.log(total))

    if u_ptr is not None:
        scale = tl.where(target == target, tl.div_rn(1.0, total), target)  # NaN if there is no such token
        here = tl.where(target == target, y, 0).to(tl.int32)
        if factor_ptr is not None:
            tl.store(factor_ptr + row, scale)
            # By the thread that has stored e there, after a barrier all the same.
            start = here // BLOCK_N * BLOCK_N
            u = exp(target - r) - total
            if CAPPED:
                u *= slope_of_cap(target, cap)
            tl.debug_barrier()
            columns = start + tl.arange(0, BLOCK_N)
            tl.store(u_ptr + columns, tl.zeros([BLOCK_N], tl.float32) + u, mask=columns == here)
        else:
            for done in range(0, vocabulary, BLOCK_N):
                start = from_end(done, vocabulary, BLOCK_N)
                z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
                u = exp(z - r) * scale - tl.where(start + tl.arange(0, BLOCK_N) == here, 1.0, 0.0)
                store_gradient(u_ptr, start, vocabulary, u, z, cap, CAPPED, BLOCK_N)


@triton.jit
def _exponentials(
    x_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
    u_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    r: tl.tensor,
    vocabulary: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """max z and Σ e^(z − r) of each lane; with a factor, e^(z − r) dz/dx is stored."""
    m = lanes(float("-inf"), BLOCK_N)
    total = lanes(0.0, BLOCK_N)
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        e = exp(z - r)
        m = tl.maximum(m, lane_max(z, BLOCK_N))
        total += lane_sum(e, BLOCK_N)
        if factor_ptr is not None:
            store_gradient(u_ptr, start, vocabulary, e, z, cap, CAPPED, BLOCK_N)
    return m, total


@row_kernel
def _token_nll_entropy_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [5, n]
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
    BLOCK_N: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    out_ptr += row * out_stride_row
    target = load_one(x_ptr, x_bias_ptr, tl.load(tokens_ptr + row * tokens_stride), vocabulary, cap, CAPPED)

    m = lanes(float("-inf"), BLOCK_N)
    l_lanes = lanes(0.0, BLOCK_N)
    weighted = lanes(0.0, BLOCK_N)  # Σ e^a a
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        m, base_lanes, step = raise_lanes(m, z, BLOCK_N)
        a = z - spread(base_lanes, BLOCK_N)
        e, factor = exp(a), exp(step)
        # Where a = −inf, e is 0.
        weighted = carry(weighted, l_lanes, step, factor) + lane_sum(e * tl.maximum(a, LOWEST), BLOCK_N)
        l_lanes = tl.fma(l_lanes, factor, lane_sum(e, BLOCK_N))
    base, step = merge(m)
    factor = exp(step)
    total = tl.sum(l_lanes * factor, 0)
    weighted_total = tl.sum(carry(weighted, l_lanes, step, factor), 0)
    log_total = tl.log(total)
    tl.store(out_ptr, (base - target) + log_total)
    tl.store(out_ptr + out_stride_value, log_total - tl.div_rn(weighted_total, total))
    tl.store(out_ptr + 2 * out_stride_value, base)
    tl.store(out_ptr + 3 * out_stride_value, log_total)
    tl.store(out_ptr + 4 * out_stride_value, base - target)


@row_kernel
def _entropy_gradient_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    out_ptr: tl.tensor,  # [5, n]: −log p[y], H, m, lse − m, m − z[y]
    weights_ptr: tl.tensor,  # [3, n]
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
    BLOCK_N: tl.constexpr,  # logits held at a time
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
    w_p = w_nll + tl.load(weights_ptr + 2 * weights_stride_value + row) - w_entropy * entropy
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        log_p = (z - base) - log_total  # in this order: large logits cancel before anything is rounded
        p = exp(log_p)
        log_p = tl.where(z == float("-inf"), 0.0, log_p)
        u = p * (w_p - w_entropy * log_p) - tl.where(start + tl.arange(0, BLOCK_N) == y, w_nll, 0.0)
        store_gradient(u_ptr, start, vocabulary, u, z, cap, CAPPED, BLOCK_N)


@row_kernel
def _clear_rows_kernel(
    # data
    u_ptr: tl.tensor,  # [n, V]
    slope_ptr: tl.tensor,  # [n]
    # shapes
    vocabulary: tl.tensor,
    # strides
    u_stride_row: tl.tensor,
    # constants
    BLOCK_N: tl.constexpr,  # entries written at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    if tl.load(slope_ptr + row) == 0.0:
        u_ptr += row * u_stride_row
        for start in range(0, vocabulary, BLOCK_N):
            store_block(u_ptr, start, vocabulary, tl.zeros([BLOCK_N], tl.float32), BLOCK_N)
