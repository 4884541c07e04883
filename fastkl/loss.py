"""Distillation losses on hidden states and the LM-head weight. The [tokens × vocabulary] logits never exist.

Every function takes `hidden` [..., D], the head's `weight` [V, D] and per-token tensors [...], in float32, bfloat16 or
float16 (float64 in: float64 throughout), and computes with

    z = softcap((hidden weightᵀ + bias) · logit_scale) / temperature        softcap(x) = softcap · tanh(x / softcap)

in float32, a chunk of tokens at a time. The options they share, all keyword-only:

    bias            [V], the head's bias.
    temperature     > 0; the temperature that the tokens were sampled at.
    logit_scale     > 0; Granite: 1 / logits_scaling, Cohere: logit_scale.
    softcap         > 0 or None; Gemma 2: final_logit_softcapping.
    ignore_index    token id whose rows take no part: log-prob 0, gradient 0.
    chunk_size      tokens per chunk; by default what a workspace of 1 GiB holds (128 MiB on a CPU). Results do not depend
                    on it beyond the rounding of sums.
    skip_zero_rows  leave masked and ignored rows out of every GEMM, and rows of zero advantage out of the gradient ones.
                    Their number must be known on the host: a synchronisation or two per call on an accelerator. False: no
                    synchronisation (as a CUDA graph needs), all rows are computed, and masked rows must be finite.
    backend         row functions: "triton", "torch", or "auto": Triton on CUDA and HIP devices, PyTorch elsewhere and for
                    float64.

Token ids outside the vocabulary raise ValueError on a CPU. On an accelerator nobody looks at them, which would be a
synchronisation: their rows become NaN (Triton) or end in a device-side assertion (PyTorch).
There are no gradients of gradients: backward with create_graph=True is refused. Formulas: `fastkl.reference`, where each
loss stands once more as plain PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl import _arguments as check
from fastkl.kernels.autograd import row_values, summed_loss
from fastkl.kernels.backend import Backend, row_functions
from fastkl.kernels.driver import Inputs, Spec, evaluate
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.surrogate import METHODS, Method, Surrogate, importance_ratio, surrogate_terms

__all__ = [
    "LossOutput",
    "linear_logprobs",
    "policy_gradient_loss",
    "reverse_kl_advantages",
    "reverse_kl_loss",
    "sampled_reverse_kl_loss",
]


class LossOutput(NamedTuple):
    """What every loss returns, whatever its options."""

    loss: Tensor  # 0-dim, or one entry per token with reduction="none"; differentiable
    logprobs: (
        Tensor | None
    )  # log-prob of each token, float32, detached, 0 where masked; None where no tokens were given
    metrics: dict[str, Tensor]  # detached 0-dim tensors; reading one is the only synchronisation


def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probs of `tokens`, float32, of their shape; 0 at ignored ones. Differentiable in hidden, weight and bias.

    Equals `torch.log_softmax(z, -1).gather(-1, tokens[..., None]).squeeze(-1)`. Any loss can be built on it: the gradient
    honours each token's own upstream value. With a frozen head the backward pass is one product over [N, D]; with a
    trainable one it forms the logits a second time, which `policy_gradient_loss` avoids.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_chunk_size(chunk_size)
    tokens = check.check_tokens(tokens, hidden, weight.shape[0], ignore_index)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    spec = Spec(row_functions(backend, hidden).token_nll, 1, options)
    flat = tokens.reshape(-1)
    active = flat != ignore_index
    index = check.select_rows(active, skip_zero_rows)
    inputs = Inputs(_flat_rows(hidden, index), weight, bias, _take(flat.where(active, 0), index))
    logprobs = _put(-row_values(spec, inputs, chunk_size)[0], index, flat.numel())
    return logprobs.where(active, 0.0).reshape(tokens.shape)


def policy_gradient_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    advantages: Tensor,  # [...]
    sampler_logprobs: Tensor | None = None,  # [...]
    *,
    mask: Tensor | None = None,
    method: Method = "importance_sampling",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    truncate_ratio: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
) -> LossOutput:
    """Policy-gradient loss with the advantages inside: every gradient comes out of one pass over the chunks.

    With ℓ = linear_logprobs(hidden, weight, tokens), r = exp(ℓ − sampler_logprobs) and A = advantages (a constant), the
    default equals `-(mask * r * A).sum() / mask.sum()`. `fastkl.kernels.surrogate` has the table of methods:

    advantages        [...], real. Rows where it is 0 cost one forward GEMM, no more.
    sampler_logprobs  [...], log-probs under the policy that sampled, at this temperature and without top-p or top-k.
                      None: the tokens come from the current policy, r = 1 (its gradient is not lost).
    mask              [...], bool or weights ≥ 0; None: every token counts.
    method            "importance_sampling", "reinforce" (r = 1), "ppo" or "cispo".
    clip_low, clip_high   of ppo and cispo: the ratio is clipped to [1 − clip_low, 1 + clip_high].
    dual_clip         of ppo, > 1: bounds the loss of a token with negative advantage at dual_clip · |A|.
    truncate_ratio    > 0: caps the ratio without cutting the token out (truncated importance sampling).
    reduction         "sum", "mean" or "none": one loss per token, [...], whose upstream gradients are not known inside; a
                      trainable head then forms the logits a second time, as under `linear_logprobs`.
    normalizer        the divisor of "mean", a number or a 0-dim tensor: the *global* token count under gradient
                      accumulation or several ranks. By default the sum of `mask` in this call.

    Metrics, over the tokens that take part: ratio_mean, ratio_min, ratio_max, clip_fraction, and k1, k3, the estimates of
    KL(sampler ‖ policy) of Schulman, "Approximating KL divergence" (2020): mean log(1/r) and mean (r − 1 − log r).

    Raises TypeError or ValueError for arguments that do not fit, before anything is computed.
    """
    surrogate = _surrogate(method, clip_low, clip_high, dual_clip, truncate_ratio, sampler_logprobs)
    reduce = check.check_reduction(reduction, normalizer)
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_chunk_size(chunk_size)
    tokens = check.check_tokens(tokens, hidden, weight.shape[0], ignore_index)
    gain = check.check_per_token("advantages", advantages, hidden).reshape(-1)
    sampler = None if sampler_logprobs is None else check.check_per_token("sampler_logprobs", sampler_logprobs, hidden)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    spec = Spec(row_functions(backend, hidden).token_nll, 1, options)

    dtype = compute_dtype(hidden.dtype)
    y = tokens.reshape(-1)
    share = check.mask_weights(mask, hidden, dtype).where(y != ignore_index, 0.0)
    active = share != 0
    y, gain = y.where(active, 0), gain.to(dtype).where(active, 0.0)
    sampler = None if sampler is None else sampler.reshape(-1).to(dtype).where(active, 0.0)
    graded = active & (gain != 0)
    index = check.select_rows(graded, skip_zero_rows)
    inputs = Inputs(_flat_rows(hidden, index), weight, bias, _take(y, index))
    graded_gain, graded_share = _take(gain, index), _take(share, index)
    graded_sampler = None if sampler is None else _take(sampler, index)

    def objective(values: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        behaviour = None if graded_sampler is None else graded_sampler[rows]
        terms = surrogate_terms(surrogate, -values[0], behaviour, graded_gain[rows])
        return terms.loss * graded_share[rows], -terms.slope * graded_share[rows]

    if reduction == "none":
        nll = row_values(spec, inputs, chunk_size)
        value, slope = objective(nll.detach(), slice(0, nll.shape[1]))
        moving = nll[0].where(slope != 0, 0.0)  # an impossible token (ℓ = −inf) has slope 0, and inf − inf is NaN
        loss = _put(value + slope * (moving - moving.detach()), index, y.numel()).reshape(tokens.shape)
    else:
        total, nll = summed_loss(spec, inputs, objective, chunk_size)
        loss = total * reduce.factor(share)
    logprobs = _put(-nll[0].detach(), index, y.numel())
    if index is not None:
        ungraded = (active & ~graded).nonzero().squeeze(1)
        rest = Inputs(_flat_rows(hidden.detach(), ungraded), weight, bias, y[ungraded])
        logprobs[ungraded] = -evaluate(spec, rest, chunk_size)[0]
    logprobs = logprobs.where(active, 0.0)
    clipped = surrogate_terms(surrogate, logprobs, sampler, gain).clipped
    return LossOutput(loss, logprobs.reshape(tokens.shape), _ratio_metrics(logprobs, sampler, clipped, active))


def reverse_kl_advantages(
    sampler_logprobs: Tensor,  # [..., T]
    teacher_logprobs: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    coef: float = 1.0,
    discount: float = 0.0,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """Advantages [..., T] of on-policy distillation: A_i = −coef · Σ_{k≥0} discountᵏ d_{i+k}.

    d = mask · (sampler_logprobs − teacher_logprobs) is the one-sample estimate of the reverse KL at a token (Thinking
    Machines, "On-Policy Distillation", 2025); with discount 0 a token answers for itself alone. The sum runs along the
    last dimension. `sequence_ids` [..., T] (integers) tells the sequences of a packed row apart: equal ids stand
    together, and no sum crosses from one to the next. The advantage of a masked token is 0, whatever its log-probs hold;
    it still takes one step of the discount.

    Returns float32 (float64 for float64 log-probs), detached.
    """
    dtype = torch.promote_types(torch.promote_types(sampler_logprobs.dtype, teacher_logprobs.dtype), torch.float32)
    for name, tensor in (("teacher_logprobs", teacher_logprobs), ("mask", mask), ("sequence_ids", sequence_ids)):
        if tensor is not None and tensor.shape != sampler_logprobs.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} but sampler_logprobs is {list(sampler_logprobs.shape)}")
        if tensor is not None:
            check.check_device(name, tensor, sampler_logprobs, "sampler_logprobs")
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must be in [0, 1]")
    difference = sampler_logprobs.detach().to(dtype) - teacher_logprobs.detach().to(dtype)
    if mask is not None:
        difference = (difference * mask).where(mask != 0, 0.0)
    if discount > 0.0 and difference.dim() > 0:
        difference = _discounted_future(difference, discount, sequence_ids)
    advantages = -coef * difference
    return advantages if mask is None else advantages.where(mask != 0, 0.0)


def sampled_reverse_kl_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    teacher_logprobs: Tensor,  # [...]
    sampler_logprobs: Tensor,  # [...]
    *,
    mask: Tensor | None = None,
    env_advantages: Tensor | None = None,
    coef: float = 1.0,
    discount: float = 0.0,
    sequence_ids: Tensor | None = None,
    method: Method = "importance_sampling",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    truncate_ratio: float | None = None,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
) -> LossOutput:
    """On-policy distillation in one call: `policy_gradient_loss` on `env_advantages + reverse_kl_advantages(...)`.

    The advantages are those of `reverse_kl_advantages(sampler_logprobs, teacher_logprobs, mask != 0, coef=coef,
    discount=discount, sequence_ids=sequence_ids)`, computed before the update, plus `env_advantages` [...] if there is an
    environment's reward too. All other arguments are those of `policy_gradient_loss`; a weight in `mask` counts once, in
    the loss.

    Metrics: those of `policy_gradient_loss` and teacher_kl, the mean of ℓ_sampler − ℓ_teacher over the tokens that count.
    """
    check.check_head(hidden, weight, bias)
    for name, tensor in (("teacher_logprobs", teacher_logprobs), ("sampler_logprobs", sampler_logprobs)):
        check.check_per_token(name, tensor, hidden)
    active = check.check_per_token("tokens", tokens, hidden) != ignore_index
    if mask is not None:
        active = active & (check.check_per_token("mask", mask, hidden) != 0)
    advantages = reverse_kl_advantages(
        sampler_logprobs, teacher_logprobs, active, coef=coef, discount=discount, sequence_ids=sequence_ids
    )
    if env_advantages is not None:
        advantages = advantages + check.check_per_token("env_advantages", env_advantages, hidden)
    output = policy_gradient_loss(
        hidden,
        weight,
        tokens,
        advantages,
        sampler_logprobs,
        mask=mask,
        method=method,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        truncate_ratio=truncate_ratio,
        reduction=reduction,
        normalizer=normalizer,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        skip_zero_rows=skip_zero_rows,
        backend=backend,
    )
    gap = sampler_logprobs.detach() - teacher_logprobs.detach()
    return output._replace(metrics={**output.metrics, "teacher_kl": _masked_mean(gap, active)})


def reverse_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [..., D_t]
    teacher_weight: Tensor,  # [V, D_t]
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
) -> LossOutput:
    """Exact reverse KL(student ‖ teacher) = Σ p (log p − log q) over the whole vocabulary, mean over tokens by default.

    Equals `(p * (log_softmax(z) - log_softmax(z_teacher))).sum(-1)` per token, both sides at the same temperature (no T²
    factor). Hidden sizes may differ; vocabularies may not. The teacher gets no gradient: asking for one is an error.

    tokens    [...], optional: where it is `ignore_index` the row takes no part; the others' student log-probs are
              returned in `logprobs` (None without tokens).
    mask      [...], bool or weights ≥ 0.
    bias, logit_scale, softcap and their teacher_ twins describe the two heads.

    Metrics, over the rows that take part: reverse_kl_mean, reverse_kl_max.
    """
    reduce = check.check_reduction(reduction, normalizer)
    student_options = check.head_options(temperature, logit_scale, softcap)
    teacher_options = check.head_options(temperature, teacher_logit_scale, teacher_softcap, "teacher_")
    check.check_head(student_hidden, student_weight, bias, "student_")
    check.check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    check.check_chunk_size(chunk_size)
    _check_teacher(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias)
    hidden, weight, bias = check.autocast(student_hidden, student_weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = check.autocast(teacher_hidden, teacher_weight, teacher_bias)
    spec = Spec(row_functions(backend, hidden).reverse_kl, 2, student_options, teacher_options)

    dtype = compute_dtype(hidden.dtype)
    share, y = check.mask_weights(mask, hidden, dtype), None
    if tokens is not None:
        y = check.check_tokens(tokens, hidden, weight.shape[0], ignore_index).reshape(-1)
        share = share.where(y != ignore_index, 0.0)
    active = share != 0
    index = check.select_rows(active, skip_zero_rows)
    inputs = Inputs(
        _flat_rows(hidden, index),
        weight,
        bias,
        None if y is None else _take(y.where(active, 0), index),
        _flat_rows(teacher_hidden, index),
        teacher_weight,
        teacher_bias,
    )
    own_share = _take(share, index)
    if reduction == "none":
        values = row_values(spec, inputs, chunk_size)
        loss = _put(values[0] * own_share, index, share.numel()).reshape(hidden.shape[:-1])
    else:
        total, values = summed_loss(spec, inputs, lambda v, rows: (v[0] * own_share[rows], own_share[rows]), chunk_size)
        loss = total * reduce.factor(share)
    kl, nll = (_put(v, index, share.numel()).where(active, 0.0) for v in values.detach())
    metrics = {"reverse_kl_mean": _masked_mean(kl, active), "reverse_kl_max": _masked_extreme(kl, active, largest=True)}
    return LossOutput(loss, None if y is None else -nll.reshape(hidden.shape[:-1]), metrics)


def _surrogate(
    method: Method,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    truncate_ratio: float | None,
    sampler_logprobs: Tensor | None,
) -> Surrogate:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    if not 0 <= clip_low <= 1 or clip_high < 0:
        raise ValueError(
            f"clip_low is {clip_low}, clip_high is {clip_high}; need 0 <= clip_low <= 1 and clip_high >= 0"
        )
    if method not in ("ppo", "cispo") and (clip_low, clip_high) != (0.2, 0.2):
        raise ValueError(
            f"clip_low is {clip_low} and clip_high is {clip_high}, but method {method!r} clips nothing; they belong to "
            f'"ppo" and "cispo"'
        )
    if dual_clip is not None and (method != "ppo" or dual_clip <= 1):
        raise ValueError(f'dual_clip is {dual_clip} with method {method!r}; it belongs to "ppo" and must be > 1')
    if truncate_ratio is not None and (not truncate_ratio > 0 or sampler_logprobs is None):
        raise ValueError(f"truncate_ratio is {truncate_ratio}; it must be > 0 and needs sampler_logprobs")
    return Surrogate(method, clip_low, clip_high, dual_clip, truncate_ratio)


def _check_teacher(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, bias: Tensor | None
) -> None:
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (teacher_hidden, teacher_weight, bias)
    ):
        raise ValueError(
            "the teacher requires a gradient, and reverse_kl_loss has none for it: run the teacher under torch.no_grad() "
            "or pass detached tensors (teacher_weight.detach())"
        )
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden is {list(teacher_hidden.shape)} but student_hidden is {list(student_hidden.shape)}: "
            f"expected the same tokens, {list(student_hidden.shape[:-1])}"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight has a vocabulary of {teacher_weight.shape[0]} but student_weight one of "
            f"{student_weight.shape[0]}; if one is a padded version of the other, cut both to the common ids "
            f"(weight[:V]); never pad with zeros, which is a logit of 0 and takes probability"
        )
    check.check_device("teacher_hidden", teacher_hidden, student_hidden, "student_hidden")
    if compute_dtype(teacher_hidden.dtype) != compute_dtype(student_hidden.dtype):
        raise TypeError(
            f"teacher_hidden is {teacher_hidden.dtype} but student_hidden is {student_hidden.dtype}; float64 goes with "
            f"float64 only"
        )


def _discounted_future(difference: Tensor, discount: float, sequence_ids: Tensor | None) -> Tensor:
    """y_i = Σ_k discountᵏ d_{i+k} within a sequence, by doubling: log₂ T steps, no division by powers of the discount."""
    total, shift = difference.clone(), 1
    while shift < difference.shape[-1]:
        later = total[..., shift:] * discount**shift
        if sequence_ids is not None:
            later = later.where(sequence_ids[..., shift:] == sequence_ids[..., :-shift], 0.0)
        total = torch.cat([total[..., :-shift] + later, total[..., -shift:]], dim=-1)
        shift *= 2
    return total


def _flat_rows(hidden: Tensor, index: Tensor | None) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if index is None else rows.index_select(0, index)


def _take(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows[index]


def _put(rows: Tensor, index: Tensor | None, n: int) -> Tensor:
    """The inverse of `_take`: 0 for rows that were left out."""
    return rows if index is None else rows.new_zeros(n).index_copy(0, index, rows)


def _ratio_metrics(
    logprobs: Tensor, sampler_logprobs: Tensor | None, clipped: Tensor, active: Tensor
) -> dict[str, Tensor]:
    ratio = importance_ratio(logprobs, sampler_logprobs)
    log_ratio = torch.zeros_like(logprobs) if sampler_logprobs is None else logprobs - sampler_logprobs
    return {
        "ratio_mean": _masked_mean(ratio, active),
        "ratio_min": _masked_extreme(ratio, active, largest=False),
        "ratio_max": _masked_extreme(ratio, active, largest=True),
        "clip_fraction": _masked_mean(clipped.to(ratio.dtype), active),
        "k1": _masked_mean(-log_ratio, active),
        "k3": _masked_mean(torch.expm1(log_ratio) - log_ratio, active),
    }


def _masked_mean(values: Tensor, active: Tensor) -> Tensor:
    """Mean over the active entries, 0 if there are none."""
    return values.where(active, 0.0).sum() / active.sum().clamp(min=1)


def _masked_extreme(values: Tensor, active: Tensor, largest: bool) -> Tensor:
    """Largest or smallest active entry, 0 if there are none."""
    if values.numel() == 0:
        return values.new_zeros(())
    extreme = values.where(active, -torch.inf).amax() if largest else values.where(active, torch.inf).amin()
    return extreme.where(active.any(), 0.0)
