"""Log-probs of tokens and the policy-gradient losses built on them (`fastkl.loss`)."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.advantages import reverse_kl_advantages
from fastkl._loss.output import LossOutput, masked_extreme, masked_mean, sparse_metrics
from fastkl._loss.rows import reduced_loss, rows_of
from fastkl._loss.sequences import Sequences
from fastkl.kernels.autograd import row_losses
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.operators import evaluate
from fastkl.kernels.problem import Backend, Inputs, Kind, RowLoss, Spec
from fastkl.kernels.sparse.estimator import Backward
from fastkl.kernels.surrogate import METHODS, Method, Surrogate, importance_ratio, surrogate_terms

Ratio = Literal["token", "sequence"]
RATIOS: tuple[Ratio, ...] = ("token", "sequence")
REDUCTIONS = ("mean", "sum", "sequence_mean", "none")


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
    backward: Backward = "exact",
    weight_grad: Tensor | None = None,
) -> Tensor:
    """Log-probs of `tokens`, float32 (float64 for float64), of their shape; 0 at ignored ones.

    Differentiable in hidden, weight and bias. Equals
    `torch.log_softmax(z, -1).gather(-1, tokens[..., None]).squeeze(-1)`. Any loss can be built on it: the gradient honours
    each token's own upstream value. With a frozen head the backward pass is one product over [N, D]; with a trainable one
    it forms the logits a second time, which `policy_gradient_loss` and a sparse backward avoid.

    It returns a tensor and no metrics: of a sparse backward `policy_gradient_loss` has them.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_plan(backend, chunk_size, weight, weight_grad)
    rows = rows_of(None, tokens, hidden, weight.shape[0], ignore_index)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    sparse = check.sparse(backward)
    spec = Spec("token_nll", options, None, backend, chunk_size, sparse=sparse)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows.tokens)
    active = rows.active if skip_zero_rows else None
    nll = row_losses(spec, inputs, RowLoss(), active, None, weight_grad).losses
    return (-nll).where(rows.active, 0.0).reshape(tokens.shape)


def policy_gradient_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    advantages: Tensor,  # [...]
    old_logprobs: Tensor | None = None,  # [...]
    *,
    mask: Tensor | None = None,
    method: Method = "importance_sampling",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    truncate_ratio: float | None = None,
    ratio: Ratio = "token",
    entropy_coef: float = 0.0,
    sequence_ids: Tensor | None = None,
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
    backward: Backward = "exact",
    weight_grad: Tensor | None = None,
) -> LossOutput:
    """Policy-gradient loss with the advantages inside: every gradient comes out of one pass over the chunks.

    With ℓ = linear_logprobs(hidden, weight, tokens), r = exp(ℓ − old_logprobs) and A = advantages (a constant), the
    default equals `-(mask * r * A).sum() / mask.sum()`. `fastkl.kernels.surrogate` has the table of methods:

    advantages        [...], real. Rows where it is 0 cost one forward GEMM, no more.
    old_logprobs      [...], log-probs under the policy that the ratio is taken against, usually the one that sampled, at
                      this temperature and without top-p or top-k.
                      None: the tokens come from the current policy, r = 1 (its gradient is not lost).
    mask              [...], bool or weights ≥ 0; None: every token counts.
    method            "importance_sampling", "reinforce" (r = 1), "ppo" or "cispo".
    clip_low, clip_high   of ppo and cispo: the ratio is clipped to [1 − clip_low, 1 + clip_high].
    dual_clip         of ppo, > 1: bounds the loss of a token with negative advantage at dual_clip · |A|.
    truncate_ratio    > 0: caps the ratio without cutting the token out (truncated importance sampling).
    ratio             "token", or "sequence": the geometric mean of a sequence's ratios in place of each of them (GSPO,
                      Zheng et al. 2025, in its per-token form). The log-probs are then needed before the loss can be
                      formed, which costs a forward GEMM more.
    entropy_coef      adds −entropy_coef · H to each token's loss, H the entropy in nats of its distribution over the
                      vocabulary, with its gradient. Rows of zero advantage then take part in the gradient.
    sequence_ids      [..., T] integers, for ratio="sequence" and reduction="sequence_mean": equal ids stand together and
                      are a sequence. None: a row along the last dimension is one. A sequence is never split between calls.
    reduction         "mean", "sum", "sequence_mean": the mean over sequences of the mean over their tokens, or "none": one
                      loss per token, [...], whose upstream gradients are not known inside; a trainable head then forms
                      the logits a second time, as under `linear_logprobs`.
    normalizer        the divisor of the means, a number or a 0-dim tensor; under gradient accumulation or several ranks the
                      *global* count, of tokens for "mean", of sequences for "sequence_mean". By default the sum of `mask`
                      over what is not ignored, or the number of sequences, in this call. "mean" with a constant,
                      sequences · longest completion, is the normaliser of Dr. GRPO (Liu et al. 2025).

    Metrics, over the tokens that take part: ratio_mean, ratio_min, ratio_max; clip_fraction, the share of tokens whose
    gradient a clip or truncate_ratio changed; k1 and k3, the estimates of KL(old ‖ policy) of Schulman, "Approximating
    KL divergence" (2020): mean log(1/r) and mean (r − 1 − log r); entropy if entropy_coef is not 0.

    Raises TypeError or ValueError for arguments that do not fit, before anything is computed.
    """
    surrogate = _surrogate(method, clip_low, clip_high, dual_clip, truncate_ratio, old_logprobs)
    _check_ratio(ratio, old_logprobs)
    check.check_finite("entropy_coef", entropy_coef)
    reduce = check.check_reduction(reduction, normalizer, REDUCTIONS)
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_plan(backend, chunk_size, weight, weight_grad)
    token_weights, active, y = rows_of(mask, tokens, hidden, weight.shape[0], ignore_index)
    advantages = check.check_per_token("advantages", advantages, hidden).reshape(-1)
    old = None if old_logprobs is None else check.check_per_token("old_logprobs", old_logprobs, hidden)
    sequences = _sequences(tokens, sequence_ids, ratio, reduction, hidden)
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    kind: Kind = "token_nll" if entropy_coef == 0.0 else "token_nll_entropy"
    sparse = check.sparse(backward)
    spec = Spec(kind, options, None, backend, chunk_size, sparse=sparse)

    dtype = compute_dtype(hidden.dtype)
    advantages = advantages.to(dtype).where(active, 0.0)
    old = None if old is None else old.reshape(-1).to(dtype).where(active, 0.0)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias, y)
    computed = active if skip_zero_rows else None
    graded = active & (advantages != 0) if skip_zero_rows and entropy_coef == 0.0 else None
    ratio_to = old
    if ratio == "sequence" and old is not None and sequences is not None:
        logprobs = -evaluate(spec, inputs, computed)[0]
        ratio_to = logprobs - sequences.mean(logprobs - old, active)  # exp(ℓ − this) is the sequence's ratio
    if reduction == "sequence_mean" and sequences is not None:
        count = sequences.count(active).to(dtype)
        token_weights = token_weights / sequences.sum(token_weights).where(active, 1.0)
    else:
        count = token_weights.sum()
    row_loss = RowLoss(token_weights, advantages, ratio_to, surrogate, entropy_coef)
    loss, values, statistics = reduced_loss(reduce, count, spec, inputs, row_loss, computed, graded, weight_grad)
    logprobs = (-values[0]).where(active, 0.0)
    clipped = surrogate_terms(surrogate, logprobs, ratio_to, advantages).clipped
    metrics = {**_ratio_metrics(logprobs, old, ratio_to, clipped, active), **sparse_metrics(statistics)}
    if entropy_coef != 0.0:
        metrics["entropy"] = masked_mean(values[1], active)
    loss = loss.reshape(tokens.shape) if reduction == "none" else loss
    return LossOutput(loss, logprobs.reshape(tokens.shape), metrics)


class PolicyOptions(TypedDict, total=False):
    """Keyword arguments of `policy_gradient_loss`."""

    mask: Tensor | None
    method: Method
    clip_low: float
    clip_high: float
    dual_clip: float | None
    truncate_ratio: float | None
    ratio: Ratio
    entropy_coef: float
    sequence_ids: Tensor | None
    reduction: str
    normalizer: Tensor | float | None
    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_size: int | None
    skip_zero_rows: bool
    backend: Backend
    backward: Backward
    weight_grad: Tensor | None


def sampled_reverse_kl_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    teacher_logprobs: Tensor,  # [...]
    sampler_logprobs: Tensor,  # [...]
    *,
    env_advantages: Tensor | None = None,
    coef: float = 1.0,
    discount: float = 0.0,
    baseline: Tensor | None = None,
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """On-policy distillation in one call: `policy_gradient_loss` on `env_advantages + reverse_kl_advantages(...)`.

    The advantages are those of `reverse_kl_advantages(sampler_logprobs, teacher_logprobs, mask != 0, coef=coef,
    discount=discount, sequence_ids=sequence_ids, baseline=baseline)`, computed before the update, plus `env_advantages`
    [...] if there is an environment's reward too. All other arguments are those of `policy_gradient_loss`; a weight in
    `mask` counts once, in the loss.

    Metrics: those of `policy_gradient_loss` and teacher_kl, the mean of ℓ_sampler − ℓ_teacher over the tokens that count.
    """
    check.check_head(hidden, weight, options.get("bias"))
    for name, tensor in (("teacher_logprobs", teacher_logprobs), ("sampler_logprobs", sampler_logprobs)):
        check.check_per_token(name, tensor, hidden)
    if baseline is not None:
        check.check_per_token("baseline", baseline, hidden)
    mask = options.get("mask")
    active = check.check_per_token("tokens", tokens, hidden) != options.get("ignore_index", -100)
    if mask is not None:
        active = active & (check.check_per_token("mask", mask, hidden) != 0)
    advantages = reverse_kl_advantages(
        sampler_logprobs,
        teacher_logprobs,
        active,
        coef=coef,
        discount=discount,
        sequence_ids=options.get("sequence_ids"),
        baseline=baseline,
    )
    if env_advantages is not None:
        advantages = advantages + check.check_per_token("env_advantages", env_advantages, hidden)
    output = policy_gradient_loss(hidden, weight, tokens, advantages, sampler_logprobs, **options)
    gap = sampler_logprobs.detach() - teacher_logprobs.detach()
    return output._replace(metrics={**output.metrics, "teacher_kl": masked_mean(gap, active)})


def _surrogate(
    method: Method,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    truncate_ratio: float | None,
    old_logprobs: Tensor | None,
) -> Surrogate:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(
            f"clip_low is {clip_low}, clip_high is {clip_high}; need 0 <= clip_low <= 1 and clip_high >= 0"
        )
    if method not in ("ppo", "cispo") and (clip_low, clip_high) != (0.2, 0.2):
        raise ValueError(
            f"clip_low is {clip_low} and clip_high is {clip_high}, but method {method!r} clips nothing; they belong to "
            f'"ppo" and "cispo"'
        )
    if dual_clip is not None and (method != "ppo" or not dual_clip > 1):
        raise ValueError(f'dual_clip is {dual_clip} with method {method!r}; it belongs to "ppo" and must be > 1')
    if truncate_ratio is not None and (not truncate_ratio > 0 or old_logprobs is None):
        raise ValueError(f"truncate_ratio is {truncate_ratio}; it must be > 0 and needs old_logprobs")
    return Surrogate(method, clip_low, clip_high, dual_clip, truncate_ratio)


def _check_ratio(ratio: Ratio, old_logprobs: Tensor | None) -> None:
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; use one of {', '.join(RATIOS)}")
    if ratio == "sequence" and old_logprobs is None:
        raise ValueError('ratio is "sequence", which needs old_logprobs: without them every ratio is 1')


def _sequences(
    tokens: Tensor, sequence_ids: Tensor | None, ratio: Ratio, reduction: str, hidden: Tensor
) -> Sequences | None:
    if sequence_ids is not None:
        check.check_per_token("sequence_ids", sequence_ids, hidden)
        check.check_integers("sequence_ids", sequence_ids)
    if ratio != "sequence" and reduction != "sequence_mean":
        return None
    if tokens.dim() == 0:
        raise ValueError("tokens is a single id, which makes no sequence: expected [..., T]")
    return Sequences(tokens, sequence_ids)


def _ratio_metrics(
    logprobs: Tensor, old_logprobs: Tensor | None, ratio_to: Tensor | None, clipped: Tensor, active: Tensor
) -> dict[str, Tensor]:
    """`ratio_to`: what the loss takes its ratio against; k1 and k3 are estimates from each token's own log-probs."""
    ratio = importance_ratio(logprobs, ratio_to)
    log_ratio = torch.zeros_like(logprobs) if old_logprobs is None else logprobs - old_logprobs
    return {
        "ratio_mean": masked_mean(ratio, active),
        "ratio_min": masked_extreme(ratio, active, largest=False),
        "ratio_max": masked_extreme(ratio, active, largest=True),
        "clip_fraction": masked_mean(clipped.to(ratio.dtype), active),
        "k1": masked_mean(-log_ratio, active),
        "k3": masked_mean(torch.expm1(log_ratio) - log_ratio, active),
    }
