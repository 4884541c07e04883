"""Log-probs of tokens and the policy-gradient losses built on them (`fastkl.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.advantages import reverse_kl_advantages
from fastkl._loss.numbers import check_logprobs
from fastkl._loss.options import LogprobOptions, PolicyOptions, Ratio, record, takes
from fastkl._loss.output import LossOutput, masked_extreme, masked_mean, sparse_metrics
from fastkl._loss.rows import flat_call, reduced_loss
from fastkl._loss.sequences import Sequences
from fastkl.kernels.autograd import row_losses
from fastkl.kernels.operators import evaluate
from fastkl.kernels.options import Surrogate
from fastkl.kernels.problem import Kind, Problem, RowLoss
from fastkl.kernels.surrogate import importance_ratio, surrogate_terms

RATIOS: tuple[Ratio, ...] = ("token", "sequence")
REDUCTIONS = ("mean", "sum", "sequence_mean", "none")


@takes(LogprobOptions)
def linear_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    **options: Unpack[LogprobOptions],
) -> Tensor:
    """Log-probs of `tokens`, float32 (float64 for float64), of their shape; 0 at ignored ones.

    Differentiable in hidden, weight and bias. Equals
    `torch.log_softmax(z, -1).gather(-1, tokens[..., None]).squeeze(-1)`. Any loss can be built on it: the gradient honours
    each token's own upstream value. With a frozen head the backward pass is one product over [N, D]; with a trainable one
    it forms the logits a second time, which `policy_gradient_loss` and a sparse backward avoid.

    It returns a tensor and no metrics: of a sparse backward `policy_gradient_loss` has them.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    call = flat_call(hidden, weight, tokens, options, "token_nll")
    problem = Problem(call.inputs, call.spec, RowLoss(call.token_weights), call.rows())
    nll = row_losses(problem, call.weight_grad).losses
    return (-nll).where(call.active, 0.0).reshape(call.shape)


@takes(PolicyOptions)
def policy_gradient_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    advantages: Tensor,  # [...]
    old_logprobs: Tensor | None = None,  # [...]
    **options: Unpack[PolicyOptions],
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
    surrogate, ratio, entropy_coef = record(Surrogate, options), options["ratio"], options["entropy_coef"]
    _check_old_logprobs(old_logprobs, ratio, surrogate)
    check.check_finite("entropy_coef", entropy_coef)
    kind: Kind = "token_nll" if entropy_coef == 0.0 else "token_nll_entropy"
    call = flat_call(hidden, weight, tokens, options, kind, reductions=REDUCTIONS)
    active, token_weights = call.active, call.token_weights
    advantages = call.per_row(check.check_per_token("advantages", advantages, hidden))
    old = None
    if old_logprobs is not None:
        old = call.per_row(check.check_per_token("old_logprobs", old_logprobs, hidden))
        check_logprobs("old_logprobs", old)
    sequences = _sequences(tokens, options, hidden)

    ratio_to = old
    if ratio == "sequence" and old is not None and sequences is not None:
        logprobs = -evaluate(Problem(call.inputs, call.spec, rows=call.rows()))[0]
        ratio_to = logprobs - sequences.mean(logprobs - old, active)  # exp(ℓ − this) is the sequence's ratio
    count = token_weights.sum()
    if call.reduction.kind == "sequence_mean" and sequences is not None:
        count = sequences.count(active).to(token_weights.dtype)
        token_weights = token_weights / sequences.sum(token_weights).where(active, 1.0)
    row_loss = RowLoss(token_weights, advantages, ratio_to, surrogate, entropy_coef)
    rows = call.rows(graded=advantages != 0 if entropy_coef == 0.0 else None)
    loss, values, statistics = reduced_loss(call, row_loss, rows, count)
    logprobs = (-values[0]).where(active, 0.0)
    clipped = surrogate_terms(surrogate, logprobs, ratio_to, advantages).clipped
    metrics = {**_ratio_metrics(logprobs, old, ratio_to, clipped, active), **sparse_metrics(statistics)}
    if entropy_coef != 0.0:
        metrics["entropy"] = masked_mean(values[1], active)
    return LossOutput(loss, logprobs.reshape(call.shape), metrics)


@takes(PolicyOptions)
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
    check.check_head(hidden, weight, options["bias"])
    for name, tensor in (("teacher_logprobs", teacher_logprobs), ("sampler_logprobs", sampler_logprobs)):
        check.check_per_token(name, tensor, hidden)
    if baseline is not None:
        check.check_per_token("baseline", baseline, hidden)
    mask = options["mask"]
    active = check.check_per_token("tokens", tokens, hidden) != options["ignore_index"]
    if mask is not None:
        active = active & (check.check_per_token("mask", mask, hidden) != 0)
    advantages = reverse_kl_advantages(
        sampler_logprobs,
        teacher_logprobs,
        active,
        coef=coef,
        discount=discount,
        sequence_ids=options["sequence_ids"],
        baseline=baseline,
    )
    if env_advantages is not None:
        advantages = advantages + check.check_per_token("env_advantages", env_advantages, hidden)
    output = policy_gradient_loss(hidden, weight, tokens, advantages, sampler_logprobs, **options)
    gap = sampler_logprobs.detach() - teacher_logprobs.detach()
    return output._replace(metrics={**output.metrics, "teacher_kl": masked_mean(gap, active)})


def _check_old_logprobs(old_logprobs: Tensor | None, ratio: Ratio, surrogate: Surrogate) -> None:
    """What needs a ratio needs old log-probs."""
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; use one of {', '.join(RATIOS)}")
    if old_logprobs is None and ratio == "sequence":
        raise ValueError('ratio is "sequence", which needs old_logprobs: without them every ratio is 1')
    if old_logprobs is None and surrogate.truncate_ratio is not None:
        raise ValueError(f"truncate_ratio is {surrogate.truncate_ratio} and needs old_logprobs")


def _sequences(tokens: Tensor, options: PolicyOptions, hidden: Tensor) -> Sequences | None:
    sequence_ids = options["sequence_ids"]
    if sequence_ids is not None:
        check.check_per_token("sequence_ids", sequence_ids, hidden)
        check.check_integers("sequence_ids", sequence_ids)
    if options["ratio"] != "sequence" and options["reduction"] != "sequence_mean":
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
