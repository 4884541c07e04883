"""Divergences (`formula.py`) in Triton, one program per row, for CUDA and HIP devices.

A program walks its row once for the sums that normalise it, once more for those that need p and q themselves, where the
kind has any, and once more, if a gradient is wanted, to write it, over the row or elsewhere. The first walk is as in
`rows/walk.py`, here for either side: with a = z − max z, l = Σ e^a, subscript t for the teacher, δ = a − a_t and
c = log(l / l_t),

    log p − log q = δ − c                    reverse_kl = Σ e^a δ / l − c            u = p (δ − Σ e^a δ / l)
    H(p) = log l − Σ e^a a / l               forward_kl = Σ e^a_t (−δ) / l_t + c     u = p − q

Equal logits give δ = 0 and l = l_t exactly. δ moves by (m − m') − (m_t − m_t') when maxima are raised.

The second walk sums φ and p s of the table in `formula.py`. With r = log(p/q) and t = e^−|r| ≤ 1, nothing there
overflows or cancels: where w and w_t are the weights of p and q in m, λ is that of the larger one of p and q and μ that
of the smaller one, with P the larger one,

    x = m / P = λ + μ t = 1 + μ (t − 1)              log(p/m) = min(r, 0) − log x       log(q/m) = −max(r, 0) − log x
    d = (p − q) / m = sign(r) (1 − t) / x             1 − p/m = −w_t d                   1 − q/m = w d
    w p log(p/m) + w_t q log(q/m) = −P (x log x + μ t |r|)

The smaller one of p and q is P t: a pair costs two exponentials and a logarithm. Equal logits have r = 0, t = 1 and x = 1
exactly, and hence a value and a gradient of exactly 0. Of the density power divergence, with S_c = (1 − t^c) / c,

    (pᵅ − qᵅ) / α = sign(r) Pᵅ S_α        φ = P¹⁺ᵅ (S_α − S_1+α) where p ≥ q, P¹⁺ᵅ (S_1+α − t S_α) where p < q

The compiler is not to fuse multiplications with additions by itself: p − q would be off by the rounding of one of them.

A hard target adds coef · power · (p¹ − 1[y]) to the gradient, p¹ = e^(power · a) / Σ e^(power · a).

Otherwise the rules are those of `rows/walk.py`; a token id outside the vocabulary makes the log-probs NaN and nothing
else, and the bits are the same whether by-products are wanted or not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.divergence.formula import BY_PRODUCTS, Divergence, HardTarget, Outputs, effective_kind, mixture
from fastkl.kernels.launch import token_ids
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import chunk, launch_rows, row_kernel, written_to
from fastkl.kernels.rows.walk import (
    LN2,
    LOG2E,
    carry,
    exp,
    first_maxima,
    first_maximum,
    from_end,
    lane_max,
    lane_sum,
    lanes,
    load_block,
    load_one,
    merge,
    raise_lanes,
    spread,
    store_gradient,
)

LN2_STEP = tl.constexpr(0.6931471805599453 / 2**23)
FAR = tl.constexpr(1000.0)
LARGEST = tl.constexpr(1e38)


def divergence(
    kind: Divergence,
    parameter: float,
    logits: Logits,
    tokens: Tensor | None,
    out: Tensor,
    gradient: Tensor | None,
    hard: HardTarget | None = None,
) -> None:
    """out[0] = the divergence, the rest of `out`, 2 rows or 8 and one of the hard target, as `Outputs` has it.

    The gradient is that of the divergence and of the hard target together. The teacher's chunk is left as it is, and the
    student's where the gradient has a place of its own.
    """
    assert logits.teacher is not None
    value, token_nll, by_products, hard_nll = Outputs.of(out)
    coef, power = hard or HardTarget(0.0, 1.0)
    m = mixture(kind, parameter)
    launch_rows(
        _divergence_kernel,
        logits,
        chunks=2,
        programs=1 if by_products or hard else 2,  # these need too many registers for two
        **chunk(logits.teacher, logits.teacher_cap, logits.teacher_bias, "_t"),
        **token_ids(tokens),
        **written_to(gradient),
        **{f"{name}_ptr": by_products.get(name) for name in BY_PRODUCTS},
        value_ptr=value,
        token_nll_ptr=token_nll,
        hard_nll_ptr=hard_nll,
        hard_coef=coef * power,
        power=power,
        out_stride_row=out.stride(1),
        weight=m.student,
        weight_t=m.teacher,
        alpha=parameter,
        KIND=effective_kind(kind, parameter),
        EXTRAS=bool(by_products),
        enable_fp_fusion=False,
    )


@row_kernel
def _divergence_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_bias_ptr: tl.tensor,  # [V] or None
    x_t_ptr: tl.tensor,  # [n, V]
    x_t_bias_ptr: tl.tensor,  # [V] or None
    tokens_ptr: tl.tensor,  # [n] or None
    value_ptr: tl.tensor,  # [n], as all results; by-products or None each
    token_nll_ptr: tl.tensor,
    hard_nll_ptr: tl.tensor,  # or None
    teacher_logprobs_ptr: tl.tensor,
    student_entropy_ptr: tl.tensor,
    teacher_entropy_ptr: tl.tensor,
    reverse_kl_ptr: tl.tensor,
    forward_kl_ptr: tl.tensor,
    top1_agreement_ptr: tl.tensor,
    u_ptr: tl.tensor,  # [n, V], the gradient: x itself or apart from it; or None
    cap: tl.tensor,
    cap_t: tl.tensor,
    weight: tl.tensor,  # m = weight · p + weight_t · q
    weight_t: tl.tensor,
    alpha: tl.tensor,  # of density_power
    hard_coef: tl.tensor,  # of p¹ − 1[y], p¹ = softmax(power · z)
    power: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # strides
    x_stride_row: tl.tensor,
    x_t_stride_row: tl.tensor,
    tokens_stride: tl.tensor,
    out_stride_row: tl.tensor,
    u_stride_row: tl.tensor,
    # constants
    KIND: tl.constexpr,
    EXTRAS: tl.constexpr,
    CAPPED: tl.constexpr,
    CAPPED_T: tl.constexpr,
    BLOCK_N: tl.constexpr,  # logits of each chunk held at a time
) -> None:
    REVERSE: tl.constexpr = EXTRAS or KIND == "reverse_kl"
    FORWARD: tl.constexpr = EXTRAS or KIND == "forward_kl"
    TWO_WALKS: tl.constexpr = KIND != "reverse_kl" and KIND != "forward_kl"
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    x_ptr += row * x_stride_row
    x_t_ptr += row * x_t_stride_row
    if u_ptr is not None:
        u_ptr += row * u_stride_row
    out_place = row * out_stride_row
    if tokens_ptr is not None:
        y = tl.load(tokens_ptr + row * tokens_stride)
        target = load_one(x_ptr, x_bias_ptr, y, vocabulary, cap, CAPPED)
        if EXTRAS:
            target_t = load_one(x_t_ptr, x_t_bias_ptr, y, vocabulary, cap_t, CAPPED_T)

    m = lanes(float("-inf"), BLOCK_N)
    m_t = lanes(float("-inf"), BLOCK_N)
    l_lanes = lanes(0.0, BLOCK_N)
    l_t_lanes = lanes(0.0, BLOCK_N)
    reverse_lanes = lanes(0.0, BLOCK_N)  # Σ e^a δ
    forward_lanes = lanes(0.0, BLOCK_N)  # −Σ e^a_t δ
    entropy_lanes = lanes(0.0, BLOCK_N)  # Σ e^a a
    entropy_t_lanes = lanes(0.0, BLOCK_N)  # Σ e^a_t a_t
    hard_lanes = lanes(0.0, BLOCK_N)  # Σ e^(power · a)
    lost_lanes = lanes(float("-inf"), BLOCK_N)  # the largest z among tokens that the teacher cannot emit
    lost_t_lanes = lanes(float("-inf"), BLOCK_N)  # the largest z_t among those that the student cannot
    if EXTRAS:
        top = lanes(0, BLOCK_N, tl.int32)  # where m is found first
        top_t = lanes(0, BLOCK_N, tl.int32)
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        z_t = load_block(x_t_ptr, x_t_bias_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
        if EXTRAS:
            top = first_maxima(top, m, z, start, BLOCK_N)
            top_t = first_maxima(top_t, m_t, z_t, start, BLOCK_N)
        m, base_lanes, step = raise_lanes(m, z, BLOCK_N)
        m_t, base_t_lanes, step_t = raise_lanes(m_t, z_t, BLOCK_N)
        a = z - spread(base_lanes, BLOCK_N)
        a_t = z_t - spread(base_t_lanes, BLOCK_N)
        e = exp(a)
        e_t = exp(a_t)
        factor = exp(step)
        factor_t = exp(step_t)
        if REVERSE:
            lost = tl.where(z_t == float("-inf"), z, float("-inf"))
            reverse_lanes = carry(reverse_lanes, l_lanes, step - step_t, factor)
            reverse_lanes += lane_sum(e * _difference(a, a_t), BLOCK_N)
            lost_lanes = tl.maximum(lost_lanes, lane_max(lost, BLOCK_N))
        if FORWARD:
            lost_t = tl.where(z == float("-inf"), z_t, float("-inf"))
            forward_lanes = carry(forward_lanes, l_t_lanes, step_t - step, factor_t)
            forward_lanes += lane_sum(e_t * _difference(a_t, a), BLOCK_N)
            lost_t_lanes = tl.maximum(lost_t_lanes, lane_max(lost_t, BLOCK_N))
        if EXTRAS:
            entropy_lanes = carry(entropy_lanes, l_lanes, step, factor)
            entropy_lanes += lane_sum(e * tl.where(e > 0.0, a, 0.0), BLOCK_N)
            entropy_t_lanes = carry(entropy_t_lanes, l_t_lanes, step_t, factor_t)
            entropy_t_lanes += lane_sum(e_t * tl.where(e_t > 0.0, a_t, 0.0), BLOCK_N)
        if hard_nll_ptr is not None:
            hard_lanes = hard_lanes * exp(step * power) + lane_sum(exp(a * power), BLOCK_N)
        l_lanes = l_lanes * factor + lane_sum(e, BLOCK_N)
        l_t_lanes = l_t_lanes * factor_t + lane_sum(e_t, BLOCK_N)
    base, step = merge(m)
    base_t, step_t = merge(m_t)
    factor = exp(step)
    factor_t = exp(step_t)
    total = tl.sum(l_lanes * factor, 0)
    total_t = tl.sum(l_t_lanes * factor_t, 0)
    scale = tl.div_rn(1.0, total)
    scale_t = tl.div_rn(1.0, total_t)
    log_total_ratio = tl.log(tl.div_rn(total, total_t))
    undefined = 0.0 * scale + 0.0 * scale_t  # 0, or NaN where a side is no distribution

    if tokens_ptr is not None:
        tl.store(token_nll_ptr + out_place, (base - target) + tl.log(total))
        if EXTRAS:
            tl.store(teacher_logprobs_ptr + out_place, -((base_t - target_t) + tl.log(total_t)))
    else:
        tl.store(token_nll_ptr + out_place, 0.0)
        if EXTRAS:
            tl.store(teacher_logprobs_ptr + out_place, 0.0)
    if hard_nll_ptr is not None:
        hard_total = tl.sum(hard_lanes * exp(step * power), 0)
        tl.store(hard_nll_ptr + out_place, (base - target) * power + tl.log(hard_total))
        hard_coef = tl.where(target == target, hard_coef, target)  # NaN if there is no such token
        hard_scale = tl.div_rn(hard_coef, hard_total)
    if REVERSE:
        reverse_lanes = carry(reverse_lanes, l_lanes, step - step_t, factor)
        mean = _mean(reverse_lanes, total, lost_lanes, base) + undefined
        reverse = mean - log_total_ratio
        if KIND == "reverse_kl":
            tl.store(value_ptr + out_place, reverse)
        if EXTRAS:
            tl.store(reverse_kl_ptr + out_place, reverse)
    if FORWARD:
        forward_lanes = carry(forward_lanes, l_t_lanes, step_t - step, factor_t)
        forward = _mean(forward_lanes, total_t, lost_t_lanes, base_t) + undefined + log_total_ratio
        if KIND == "forward_kl":
            tl.store(value_ptr + out_place, forward)
        if EXTRAS:
            tl.store(forward_kl_ptr + out_place, forward)
    if EXTRAS:
        entropy_sum = tl.sum(carry(entropy_lanes, l_lanes, step, factor), 0)
        entropy_t_sum = tl.sum(carry(entropy_t_lanes, l_t_lanes, step_t, factor_t), 0)
        tl.store(student_entropy_ptr + out_place, tl.log(total) - tl.div_rn(entropy_sum, total))
        tl.store(teacher_entropy_ptr + out_place, tl.log(total_t) - tl.div_rn(entropy_t_sum, total_t))
        agree = first_maximum(top, m, vocabulary) == first_maximum(top_t, m_t, vocabulary)
        tl.store(top1_agreement_ptr + out_place, tl.where(agree, 1.0, 0.0) + undefined)

    # log2 p is (z − base) log2 e less this; equal logits have equal ones.
    log_total = tl.log2(total)
    log_total_t = tl.log2(total_t)
    if TWO_WALKS:
        value_lanes = lanes(0.0, BLOCK_N)
        mean_lanes = lanes(0.0, BLOCK_N)
        for done in range(0, vocabulary, BLOCK_N):
            start = from_end(done, vocabulary, BLOCK_N)
            z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
            z_t = load_block(x_t_ptr, x_t_bias_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
            log_p = tl.fma(z - base, LOG2E, -log_total)
            log_q = tl.fma(z_t - base_t, LOG2E, -log_total_t)
            phi, p, s = _terms(log_p, log_q, weight, weight_t, alpha, KIND)
            value_lanes += lane_sum(phi, BLOCK_N)
            mean_lanes += lane_sum(p * s, BLOCK_N)
        mean = tl.sum(mean_lanes, 0) + undefined
        tl.store(value_ptr + out_place, tl.sum(value_lanes, 0) + undefined)

    if u_ptr is not None:
        for done in range(0, vocabulary, BLOCK_N):  # from where the walk before it ended
            start = done if TWO_WALKS else from_end(done, vocabulary, BLOCK_N)
            z = load_block(x_ptr, x_bias_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
            z_t = load_block(x_t_ptr, x_t_bias_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
            a = z - base
            a_t = z_t - base_t
            log_p = tl.fma(a, LOG2E, -log_total)
            log_q = tl.fma(a_t, LOG2E, -log_total_t)
            if KIND == "forward_kl":
                u = tl.exp2(log_p) - tl.exp2(log_q)
            elif KIND == "reverse_kl":
                u = tl.exp2(log_p) * (_difference(a, a_t) - mean)
            else:
                phi, p, s = _terms(log_p, log_q, weight, weight_t, alpha, KIND)
                u = p * (s - mean)
            if hard_nll_ptr is not None:
                is_token = start + tl.arange(0, BLOCK_N) == y.to(tl.int32)
                u += exp(a * power) * hard_scale - tl.where(is_token, hard_coef, 0.0)
            store_gradient(u_ptr, start, vocabulary, u, z, cap, CAPPED, BLOCK_N)


@triton.jit
def _difference(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a − b; 0 for a token that the student cannot emit, and for one that the teacher cannot, counted as `lost`."""
    return tl.where((a == float("-inf")) | (b == float("-inf")), 0.0, a - b)


@triton.jit
def _mean(sum_lanes: tl.tensor, total: tl.tensor, lost_lanes: tl.tensor, base: tl.tensor) -> tl.tensor:
    """The lanes' sum over `total`; +inf if the probability of a lost token is not 0."""
    lost = tl.exp(tl.max(lost_lanes, 0) - base) * tl.div_rn(1.0, total)
    return tl.div_rn(tl.sum(sum_lanes, 0), total) + tl.where(lost > 0.0, float("inf"), 0.0)


@triton.jit
def _terms(
    log_p: tl.tensor,
    log_q: tl.tensor,
    weight: tl.tensor,
    weight_t: tl.tensor,
    alpha: tl.tensor,
    KIND: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """φ, p and s of a kind that needs two walks, from log2 p and log2 q."""
    if KIND == "total_variation":
        p = tl.exp2(log_p)
        difference = p - tl.exp2(log_q)
        s = tl.where(difference > 0.0, 0.5, 0.0) - tl.where(difference < 0.0, 0.5, 0.0)
        return s * difference, p, s
    if KIND == "density_power":
        return _power_terms(log_p, log_q, alpha)
    # r = log2(p/q), 0 where neither side can emit the token, no further off than it takes for one of the two to be 0.
    log_peak = tl.maximum(log_p, log_q)
    r = tl.where(log_peak == float("-inf"), 0.0, log_p - log_q)
    r = tl.minimum(tl.maximum(r, -FAR), FAR)
    t = tl.exp2(-tl.abs(r))
    r *= LN2
    peak = tl.exp2(log_peak)
    student_less = r < 0.0
    p = tl.where(student_less, peak * t, peak)
    larger = tl.where(student_less, weight_t, weight)
    smaller = tl.where(student_less, weight, weight_t)
    x = tl.where(t < 0.5, tl.fma(smaller, t, larger), tl.fma(smaller, t - 1.0, 1.0))
    log_x = _log(x)
    if KIND == "jsd":
        phi = -peak * tl.fma(x, log_x, smaller * t * tl.abs(r))
        s = weight * (tl.minimum(r, 0.0) - log_x)
    else:
        d = tl.where(student_less, t - 1.0, 1.0 - t) / x
        if KIND == "skewed_forward_kl":
            s = weight * weight * d
            phi = tl.where(student_less, peak, peak * t) * (tl.minimum(-r, 0.0) - log_x)
        else:
            log_p_m = tl.minimum(r, 0.0) - log_x
            s = log_p_m - weight * weight_t * d
            phi = p * log_p_m
    return phi, p, s


@triton.jit
def _power_terms(log_p: tl.tensor, log_q: tl.tensor, alpha: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """φ, p and s of the density power divergence, from log2 p and log2 q."""
    log_peak = tl.maximum(log_p, log_q)
    r = tl.where(log_peak == float("-inf"), 0.0, log_p - log_q)
    student_less = r < 0.0
    r = tl.minimum(tl.abs(r), LARGEST)
    t = tl.exp2(-r)
    t_alpha = tl.exp2(-alpha * r)
    r *= LN2
    first = _share(r, t_alpha, alpha)
    second = _share(r, t * t_alpha, 1.0 + alpha)
    peak = tl.exp2(log_peak)
    scale = tl.exp2(alpha * log_peak)
    phi = scale * peak * tl.where(student_less, second - t * first, first - second)
    s = scale * tl.where(student_less, -first, first)
    return phi, tl.where(student_less, peak * t, peak), s


@triton.jit
def _share(r: tl.tensor, power_of_t: tl.tensor, power: tl.tensor) -> tl.tensor:
    """(1 − e^(−power · r)) / power, of which the exponential is known; by its series where that is near 1."""
    x = power * r
    series = tl.fma(x, -1.0 / 720.0, 1.0 / 120.0)
    series = tl.fma(series, x, -1.0 / 24.0)
    series = tl.fma(series, x, 1.0 / 6.0)
    series = tl.fma(series, x, -0.5)
    series = tl.fma(series, x, 1.0)
    return tl.where(x < 0.25, r * series, (1.0 - power_of_t) * tl.div_rn(1.0, power))


@triton.jit
def _log(x: tl.tensor) -> tl.tensor:
    """log x for normal numbers x in (0, 1], exactly 0 of 1, within 2 ulp; `tl.log` looks for others too.

    x = 2^k (1 + f) with 1 + f in [√½, √2), and log(1 + f) = f + f² Q(f), Q a fit of degree 7.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(f, 0.08734750747680664, -0.14307482540607452)
    q = tl.fma(q, f, 0.14917989075183868)
    q = tl.fma(q, f, -0.165705144405365)
    q = tl.fma(q, f, 0.19962070882320404)
    q = tl.fma(q, f, -0.25001755356788635)
    q = tl.fma(q, f, 0.33333951234817505)
    q = tl.fma(q, f, -0.49999991059303284)
    return tl.fma(exponent.to(tl.float32), LN2_STEP, tl.fma(f * f, q, f))
