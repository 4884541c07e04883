"""The cross-entropy of a row with its target, smoothed and regularised, in Triton, in the way of `walk.py`.

The formulas are those of `pytorch.py`. The smoothed part is summed as D = Σ c (z − r) with r = z[y], or 0 if that is −inf:
a number that is known before the walk, so that large logits cancel and nothing is carried when the maximum is raised. Then
Σ c (−log p) = C (lse − r) − D.

Of a vocabulary in pieces there are no kernels of its own: values and gradient are those of `rows/triton.py`, weighted.
A smoothed part and predictions are for PyTorch then (`backend.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.launch import token_ids
from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.rows.cross_entropy.pytorch import from_scores
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_rows, row_kernel, written_to
from fastkl.kernels.rows.parallel.vocabulary import WHOLE
from fastkl.kernels.rows.triton import entropy_gradient, token_nll_entropy
from fastkl.kernels.rows.walk import (
    exp,
    first_maxima,
    first_maximum,
    from_end,
    lane_sum,
    lanes,
    load_block,
    load_one,
    merge,
    raise_lanes,
    spread,
    store_gradient,
)


def cross_entropy(
    options: CrossEntropy, logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None
) -> None:
    assert tokens is not None
    smoothing, c = options.label_smoothing, logits.class_weight
    if logits.vocabulary is not WHOLE:
        _of_pieces(options, logits, tokens, out, gradient)
        return
    launch_rows(
        _cross_entropy_kernel,
        logits,
        programs=1 if smoothing != 0.0 or len(out) > 4 else 2,  # those need too many registers for two
        **token_ids(tokens),
        **written_to(gradient),
        class_weight_ptr=c,
        class_total_ptr=None if c is None else c.sum(0, keepdim=True),
        out_ptr=out,
        out_stride_value=out.stride(0),
        out_stride_row=out.stride(1),
        kept=1.0 - smoothing,
        share=smoothing / logits.student.shape[1],
        z_loss=options.z_loss,
        SMOOTH=smoothing != 0.0,
        PREDICT=len(out) > 4,
    )


def _of_pieces(options: CrossEntropy, logits: Logits, tokens: Tensor, out: Tensor, gradient: Tensor | None) -> None:
    """From the scores that the processes have merged, without a smoothing."""
    scores, c = out.new_empty(5, out.shape[1]), logits.class_weight
    token_nll_entropy(logits, tokens, scores, None)
    from_scores(options, scores, tokens, c, out)
    if gradient is not None:
        b = torch.ones_like(scores[0]) if c is None else c[tokens]
        weights = torch.stack([b, torch.zeros_like(b), 2.0 * options.z_loss * out[2]])
        entropy_gradient(logits, tokens, scores, weights, gradient)


@row_kernel
def _cross_entropy_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n]
    class_weight_ptr: tl.tensor,  # [V] or None
    class_total_ptr: tl.tensor,  # [1], their sum, or None
    out_ptr: tl.tensor,  # [4 or 5, n]
    u_ptr: tl.tensor,  # [n, V], the gradient: x itself or apart from it; or None
    cap: tl.tensor,
    kept: tl.tensor,  # 1 − ε
    share: tl.tensor,  # ε / V
    z_loss: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_value: tl.tensor,
    out_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PREDICT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # logits held at a time
) -> None:
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    out_ptr += row * out_stride_row
    if u_ptr is not None:
        u_ptr += row * u_stride_row
    y = tl.load(tokens_ptr + row * tokens_stride)
    target = load_one(x_ptr, x_bias_ptr, y, vocabulary, cap, CAPPED)
    b = kept
    if class_weight_ptr is not None:
        b *= tl.load(class_weight_ptr + y, mask=(y >= 0) & (y < vocabulary), other=float("nan"))
    offset = tl.where(tl.abs(target) < float("inf"), target, 0.0)

    m = lanes(float("-inf"), BLOCK_N)
    l_lanes = lanes(0.0, BLOCK_N)
    d_lanes = lanes(0.0, BLOCK_N)
    if PREDICT:
        top = lanes(0, BLOCK_N, tl.int32)  # where m is found first
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        if PREDICT:
            top = first_maxima(top, m, z, start, BLOCK_N)
        m, base_lanes, step = raise_lanes(m, z, BLOCK_N)
        l_lanes = l_lanes * exp(step) + lane_sum(exp(z - spread(base_lanes, BLOCK_N)), BLOCK_N)
        if SMOOTH:
            c = _class_weights(class_weight_ptr, start, vocabulary, BLOCK_N)
            d_lanes += lane_sum(tl.where(c == 0.0, 0.0, c * (z - offset)), BLOCK_N)
    base, step = merge(m)
    total = tl.sum(l_lanes * exp(step), 0)
    log_total = tl.log(total)
    nll = (base - target) + log_total
    lse = base + log_total
    value = tl.where(b == 0.0, 0.0, b * nll) + z_loss * lse * lse
    a = b + 2.0 * z_loss * lse
    if SMOOTH:
        c_sum = vocabulary * 1.0
        if class_weight_ptr is not None:
            c_sum = tl.load(class_total_ptr)
        value += share * (c_sum * ((base - offset) + log_total) - tl.sum(d_lanes, 0))
        a += share * c_sum
    tl.store(out_ptr, value)
    tl.store(out_ptr + out_stride_value, nll)
    tl.store(out_ptr + 2 * out_stride_value, lse)
    tl.store(out_ptr + 3 * out_stride_value, base - target)
    if PREDICT:
        tl.store(out_ptr + 4 * out_stride_value, first_maximum(top, m, vocabulary) + 0.0)

    if u_ptr is not None:
        scale = a * tl.where(target == target, tl.div_rn(1.0, total), target)  # NaN if there is no such token
        for done in range(0, vocabulary, BLOCK_N):
            start = from_end(done, vocabulary, BLOCK_N)
            z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
            u = exp(z - base) * scale - tl.where(start + tl.arange(0, BLOCK_N) == y.to(tl.int32), b, 0.0)
            if SMOOTH:
                u -= share * _class_weights(class_weight_ptr, start, vocabulary, BLOCK_N)
            store_gradient(u_ptr, start, vocabulary, u, z, cap, CAPPED, BLOCK_N)


@triton.jit
def _class_weights(
    class_weight_ptr: tl.tensor, start: tl.tensor, vocabulary: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """c of a block, 1 without class weights; 0 beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK_N)
    inside = columns < vocabulary
    c = tl.where(inside, 1.0, 0.0)
    if class_weight_ptr is not None:
        c = tl.load(class_weight_ptr + columns, mask=inside, other=0.0)
    return c
