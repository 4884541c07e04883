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
of the smaller one,

    x = m / max(p, q) = λ + μ t = 1 + μ (t − 1)       log(p/m) = min(r, 0) − log x       log(q/m) = −max(r, 0) − log x
    d = (p − q) / m = sign(r) (1 − t) / x             1 − p/m = −w_t d                   1 − q/m = w d

Equal logits have r = 0, t = 1 and x = 1 exactly, and hence a value and a gradient of exactly 0. The compiler is not to fuse
multiplications with additions: p − q would be off by the rounding of one of them.

A hard target adds coef · power · (p¹ − 1[y]) to the gradient, p¹ = e^(power · a) / Σ e^(power · a).

Otherwise the rules are those of `rows/walk.py`; a token id outside the vocabulary makes the log-probs NaN and nothing
else, and the bits are the same whether by-products are wanted or not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastkl.kernels.divergence.formula import BY_PRODUCTS, Divergence, HardTarget, Outputs, mixture, without_mixture
from fastkl.kernels.launch import token_ids
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import chunk, launch_rows, row_kernel, written_to
from fastkl.kernels.rows.walk import carry, finite_or_zero, load_block, load_one, raise_max, store_gradient


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
        logits.student,
        logits.student_cap,
        chunks=2,
        programs=1 if by_products or hard else 2,  # these need too many registers for two
        **chunk(logits.teacher, logits.teacher_cap, "_t"),
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
        KIND=without_mixture(kind, parameter),
        EXTRAS=bool(by_products),
        enable_fp_fusion=False,
    )


@row_kernel
def _divergence_kernel(
    # data
    x_ptr: tl.tensor,  # [n, V]
    x_t_ptr: tl.tensor,  # [n, V]
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
        target = load_one(x_ptr, y, vocabulary, cap, CAPPED)
        if EXTRAS:
            target_t = load_one(x_t_ptr, y, vocabulary, cap_t, CAPPED_T)

    m = float("-inf")
    m_t = float("-inf")
    top = 0  # where m is found first
    top_t = 0
    l_lanes = tl.zeros([BLOCK_N], tl.float32)
    l_t_lanes = tl.zeros([BLOCK_N], tl.float32)
    reverse_lanes = tl.zeros([BLOCK_N], tl.float32)  # Σ e^a δ
    forward_lanes = tl.zeros([BLOCK_N], tl.float32)  # −Σ e^a_t δ
    entropy_lanes = tl.zeros([BLOCK_N], tl.float32)  # Σ e^a a
    entropy_t_lanes = tl.zeros([BLOCK_N], tl.float32)  # Σ e^a_t a_t
    hard_lanes = tl.zeros([BLOCK_N], tl.float32)  # Σ e^(power · a)
    lost_lanes = tl.full(
        [BLOCK_N], float("-inf"), tl.float32
    )  # the largest z among tokens that the teacher cannot emit
    lost_t_lanes = tl.full([BLOCK_N], float("-inf"), tl.float32)  # the largest z_t among those that the student cannot
    for start in range(0, vocabulary, BLOCK_N):
        z = load_block(x_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
        z_t = load_block(x_t_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
        m_before, m_t_before = m, m_t
        m, base, step = raise_max(m, z, 1.0, 0)
        m_t, base_t, step_t = raise_max(m_t, z_t, 1.0, 0)
        a = z - base
        a_t = z_t - base_t
        e = tl.exp(a)
        e_t = tl.exp(a_t)
        factor = tl.exp(step)
        factor_t = tl.exp(step_t)
        if REVERSE:
            reverse_lanes = carry(reverse_lanes, l_lanes, step - step_t, factor) + e * _difference(a, a_t)
            lost_lanes = tl.maximum(lost_lanes, tl.where(z_t == float("-inf"), z, float("-inf")))
        if FORWARD:
            forward_lanes = carry(forward_lanes, l_t_lanes, step_t - step, factor_t) + e_t * _difference(a_t, a)
            lost_t_lanes = tl.maximum(lost_t_lanes, tl.where(z == float("-inf"), z_t, float("-inf")))
        if EXTRAS:
            entropy_lanes = carry(entropy_lanes, l_lanes, step, factor) + e * tl.where(e > 0.0, a, 0.0)
            entropy_t_lanes = carry(entropy_t_lanes, l_t_lanes, step_t, factor_t) + e_t * tl.where(e_t > 0.0, a_t, 0.0)
            if m > m_before:
                top = start + tl.argmax(z, 0)
            if m_t > m_t_before:
                top_t = start + tl.argmax(z_t, 0)
        if hard_nll_ptr is not None:
            hard_lanes = tl.fma(hard_lanes, tl.exp(step * power), tl.exp(a * power))
        l_lanes = tl.fma(l_lanes, factor, e)
        l_t_lanes = tl.fma(l_t_lanes, factor_t, e_t)
    base = finite_or_zero(m)
    base_t = finite_or_zero(m_t)
    total = tl.sum(l_lanes, 0)
    total_t = tl.sum(l_t_lanes, 0)
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
        hard_total = tl.sum(hard_lanes, 0)
        tl.store(hard_nll_ptr + out_place, (base - target) * power + tl.log(hard_total))
        hard_coef = tl.where(target == target, hard_coef, target)  # NaN if there is no such token
        hard_scale = tl.div_rn(hard_coef, hard_total)
    if REVERSE:
        mean = _mean(reverse_lanes, total, lost_lanes, base) + undefined
        reverse = mean - log_total_ratio
        if KIND == "reverse_kl":
            tl.store(value_ptr + out_place, reverse)
        if EXTRAS:
            tl.store(reverse_kl_ptr + out_place, reverse)
    if FORWARD:
        forward = _mean(forward_lanes, total_t, lost_t_lanes, base_t) + undefined + log_total_ratio
        if KIND == "forward_kl":
            tl.store(value_ptr + out_place, forward)
        if EXTRAS:
            tl.store(forward_kl_ptr + out_place, forward)
    if EXTRAS:
        tl.store(student_entropy_ptr + out_place, tl.log(total) - tl.div_rn(tl.sum(entropy_lanes, 0), total))
        tl.store(teacher_entropy_ptr + out_place, tl.log(total_t) - tl.div_rn(tl.sum(entropy_t_lanes, 0), total_t))
        tl.store(top1_agreement_ptr + out_place, tl.where(top == top_t, 1.0, 0.0) + undefined)

    last = (vocabulary - 1) // BLOCK_N * BLOCK_N
    if TWO_WALKS:
        value_lanes = tl.zeros([BLOCK_N], tl.float32)
        mean_lanes = tl.zeros([BLOCK_N], tl.float32)
        for done in range(0, vocabulary, BLOCK_N):  # from the end: what was read last is still in the L2 cache
            start = last - done
            z = load_block(x_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
            z_t = load_block(x_t_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
            p = tl.exp(z - base) * scale
            q = tl.exp(z_t - base_t) * scale_t
            r = _log_ratio(z - base, z_t - base_t, log_total_ratio)
            phi, s = _terms(p, q, r, weight, weight_t, KIND)
            value_lanes += phi
            mean_lanes += p * s
        mean = tl.sum(mean_lanes, 0) + undefined
        tl.store(value_ptr + out_place, tl.sum(value_lanes, 0) + undefined)

    if u_ptr is not None:
        for done in range(0, vocabulary, BLOCK_N):  # from where the walk before it ended
            start = done if TWO_WALKS else last - done
            z = load_block(x_ptr, start, vocabulary, cap, CAPPED, BLOCK_N)
            z_t = load_block(x_t_ptr, start, vocabulary, cap_t, CAPPED_T, BLOCK_N)
            p = tl.exp(z - base) * scale
            q = tl.exp(z_t - base_t) * scale_t
            if KIND == "forward_kl":
                u = p - q
            elif KIND == "reverse_kl":
                u = p * (_difference(z - base, z_t - base_t) - mean)
            else:
                r = _log_ratio(z - base, z_t - base_t, log_total_ratio)
                phi, s = _terms(p, q, r, weight, weight_t, KIND)
                u = p * (s - mean)
            if hard_nll_ptr is not None:
                is_token = start + tl.arange(0, BLOCK_N) == y.to(tl.int32)
                u += tl.exp((z - base) * power) * hard_scale - tl.where(is_token, hard_coef, 0.0)
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
def _log_ratio(a: tl.tensor, a_t: tl.tensor, log_total_ratio: tl.tensor) -> tl.tensor:
    """log(p/q), 0 where neither side can emit the token; no further off than it takes for one of the two to be 0."""
    far = 1000.0
    r = tl.where((a == float("-inf")) & (a_t == float("-inf")), 0.0, a - a_t - log_total_ratio)
    return tl.minimum(tl.maximum(r, -far), far)


@triton.jit
def _terms(
    p: tl.tensor, q: tl.tensor, r: tl.tensor, weight: tl.tensor, weight_t: tl.tensor, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """φ and s of a kind that needs two walks."""
    if KIND == "total_variation":
        difference = p - q
        s = tl.where(difference > 0.0, 0.5, 0.0) - tl.where(difference < 0.0, 0.5, 0.0)
        phi = s * difference
    else:
        t = tl.exp(-tl.abs(r))
        larger = tl.where(r < 0.0, weight_t, weight)
        smaller = tl.where(r < 0.0, weight, weight_t)
        x = tl.where(t < 0.5, larger + smaller * t, 1.0 + smaller * (t - 1.0))
        log_x = tl.log(x)
        d = tl.where(r < 0.0, t - 1.0, 1.0 - t) / x
        log_p_m = tl.minimum(r, 0.0) - log_x
        log_q_m = -tl.maximum(r, 0.0) - log_x
        if KIND == "jsd":
            s = weight * log_p_m
            phi = p * s + weight_t * q * log_q_m
        elif KIND == "skewed_forward_kl":
            s = weight * weight * d
            phi = q * log_q_m
        else:
            s = log_p_m - weight * weight_t * d
            phi = p * log_p_m
    return phi, s
