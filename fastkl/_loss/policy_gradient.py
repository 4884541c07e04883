"""The policy-gradient losses (`fastkl.loss`)."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.advantages import reverse_kl_advantages
from fastkl._loss.options import PolicyOptions, Ratio, record, takes
from fastkl._loss.output import LossOutput, masked_mean, ratio_metrics, sparse_metrics
from fastkl._loss.rows import Call, flat_call, reduced_loss, token_logprobs
from fastkl._loss.sequences import Sequences
from fastkl.kernels.operators.library import evaluate
from fastkl.kernels.options import RatioBounds, Surrogate
from fastkl.kernels.problem import Kind, Problem, RowLoss
from fastkl.kernels.surrogate import (
    bounded,
    importance_ratio,
    k3,
    log_ratio,
    outside_bounds,
    reference_kl,
    surrogate_terms,
)

RATIOS: tuple[Ratio, ...] = ("token", "sequence")
REDUCTIONS = ("mean", "sum", "sequence_mean", "none")


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

    advantages        [...], real. Or one per row, [B] or [B, 1] for tokens [B, T], unless there are sequence_ids. Rows of
                      zero advantage cost one forward GEMM, no more. Importance weights w, as those of a sampler with other
                      numerics, belong here: `advantages * w`. In `mask` they would change what a mean divides by.
    old_logprobs      [...], log-probs under the policy that the ratio is taken against, usually the one that sampled, at
                      this temperature and without top-p or top-k.
                      None: the tokens come from the current policy, r = 1 (its gradient is not lost).
    mask              [...], bool or weights ≥ 0; None: every token counts.
    method            "importance_sampling", "reinforce" (r = 1), "ppo" or "cispo".
    clip_low, clip_high   of ppo and cispo: the ratio is clipped to [1 − clip_low, 1 + clip_high]. An upper bound b alone,
                      as other libraries give it for CISPO, is clip_low=1, clip_high=b − 1; b may be below 1 there.
    dual_clip         of ppo, > 1: bounds the loss of a token with negative advantage at dual_clip · |A|. Elsewhere it is
                      called delta, for two-sided clipping, and is the same where delta ≥ 1 + clip_high.
    truncate_ratio    > 0: caps the ratio without cutting the token out (truncated importance sampling).
    ratio_bounds      (low, high), 0 ≤ low < high ≤ ∞: tokens whose ratio is outside are left out (IcePop; masked
                      importance sampling). Their loss and gradient are 0, with all that is added to a loss below. They
                      still count where a mean divides. With ratio="sequence" whole sequences are left out, and cost no
                      GEMM of a gradient. The ratio is the one before clips and truncate_ratio.
    ratio             "token", or "sequence": the geometric mean of a sequence's ratios in place of each of them (GSPO,
                      Zheng et al. 2025, in its per-token form). The log-probs are then needed before the loss can be
                      formed, which costs a forward GEMM more. Without old_logprobs it is what "token" is.
                      Each token's gradient is weighted with its own advantage. Where advantages or weights differ within
                      a sequence, that is not the gradient of the ratio times their mean, though the values are equal:
                      average them over the sequence first if you mean that. It holds for r · k of ref_kl_ratio too.
    entropy_coef      adds −entropy_coef · H to each token's loss, H the entropy in nats of its distribution over the
                      vocabulary, with its gradient. Rows of zero advantage then take part in the gradient.
    ref_logprobs      [...], log-probs under a reference model, at this temperature.
    ref_kl_coef       ≥ 0: adds ref_kl_coef · k to each token's loss, an estimate k of KL(policy ‖ reference) with its
                      gradient (beta of GRPO, Shao et al. 2024). It is reduced as the loss is. Rows of zero advantage then
                      take part in the gradient.
    ref_kl            k, with d = ref_logprobs − ℓ: "k1", −d; "k2", ½ d²; "k3", exp(d) − d − 1, as in GRPO. On tokens of the
                      policy itself the gradient of k1 is 0 on average, that of k2 is the KL's, and that of k3 is the one
                      of KL(reference ‖ policy).
    ref_kl_ratio      True: r · k in place of k, with the gradient of both. For k1 and k3 it is then on average the KL's, on
                      tokens of the old policy too (DeepSeek-V3.2, 2025). Clips do not act on this r; truncate_ratio does.
    sequence_ids      [..., T] integers, for ratio="sequence" and reduction="sequence_mean": equal ids stand together and
                      are a sequence. None: a row along the last dimension is one. A sequence is never split between calls.
    reduction         "mean", "sum", "sequence_mean": the mean over sequences of the mean over their tokens, or "none": one
                      loss per token, [...], whose upstream gradients are not known inside; a trainable head then forms
                      the logits a second time, as under `linear_logprobs`.
    normalizer        the divisor of the means, a number or a 0-dim tensor; under gradient accumulation or several ranks the
                      *global* count, of tokens for "mean", of sequences for "sequence_mean". By default the sum of `mask`
                      over what is not ignored, or the number of sequences, in this call. "mean" with a constant,
                      sequences · longest completion, is the normaliser of Dr. GRPO (Liu et al. 2025).
                      A tensor may be 0 where nothing counts: the loss is then 0. Where something does, a normalizer that
                      is not > 0 is refused on a CPU. On an accelerator nobody looks, and it makes the loss NaN.

    ℓ − old_logprobs and ref_logprobs − ℓ are clamped to ±20, so that no token makes a loss infinite: beyond that the ratio,
    or k, is a constant without a gradient. A ratio that truncate_ratio caps keeps its gradient. With ratio="sequence" the
    clamped log-ratio is the mean.

    Metrics, over the tokens that take part, those outside the bounds among them: ratio_mean, ratio_min, ratio_max;
    clip_fraction, the share of tokens whose gradient a clip or truncate_ratio changed; of ppo and cispo also
    clip_low_fraction and clip_high_fraction, the shares with r below the lower bound and A < 0, and above the upper one and
    A > 0; out_of_bounds_fraction, if there are ratio_bounds; k1 and k3, the estimates of KL(old ‖ policy) of Schulman,
    "Approximating KL divergence" (2020): mean log(1/r) and mean (r − 1 − log r); ref_kl, the mean of k (of r · k with
    ref_kl_ratio) if there are ref_logprobs; entropy if entropy_coef is not 0.

    Raises TypeError or ValueError for arguments that do not fit, before anything is computed.
    """
    surrogate, entropy_coef = _surrogate(options), options["entropy_coef"]
    _check_what_belongs_together(old_logprobs, options)
    check.check_finite("entropy_coef", entropy_coef)
    kind: Kind = "token_nll" if entropy_coef == 0.0 else "token_nll_entropy"
    call = flat_call(hidden, weight, tokens, options, kind, reductions=REDUCTIONS)
    active, token_weights = call.active, call.token_weights
    advantages = call.per_row(_advantages("advantages", advantages, hidden, options["sequence_ids"]))
    old = token_logprobs(call, "old_logprobs", old_logprobs, hidden)
    ref = token_logprobs(call, "ref_logprobs", options["ref_logprobs"], hidden)
    sequences = _sequences(tokens, options, hidden)

    graded = advantages != 0 if entropy_coef == 0.0 and surrogate.ref_kl_coef == 0.0 else None
    log_ratios = None
    if options["ratio"] == "sequence" and old is not None and sequences is not None:
        log_ratios = _sequence_log_ratios(call, old, sequences)
        if surrogate.ratio_bounds is not None:
            inside = ~outside_bounds(surrogate, importance_ratio(log_ratios, surrogate.truncate_ratio).whole)
            graded = inside if graded is None else graded & inside
    count = token_weights.sum()
    if call.reduction.kind == "sequence_mean" and sequences is not None:
        count = sequences.count(active).to(token_weights.dtype)
        token_weights = token_weights / sequences.sum(token_weights).where(active, 1.0)
    row_loss = RowLoss(token_weights, advantages, old, surrogate, entropy_coef, log_ratios=log_ratios)
    if surrogate.ref_kl_coef != 0.0:
        row_loss = row_loss._replace(ref_logprobs=ref)
    loss, values, statistics = reduced_loss(call, row_loss, call.rows(graded), count)
    logprobs = (-values[0]).where(active, 0.0)
    metrics = {**_metrics(row_loss._replace(ref_logprobs=ref), logprobs, active), **sparse_metrics(statistics)}
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
    power: float = 0.0,
    **options: Unpack[PolicyOptions],
) -> LossOutput:
    """On-policy distillation in one call: `policy_gradient_loss` on `env_advantages + reverse_kl_advantages(...)`.

    The advantages are those of `reverse_kl_advantages(sampler_logprobs, teacher_logprobs, mask != 0, coef=coef,
    discount=discount, sequence_ids=sequence_ids, baseline=baseline, power=power)`, computed before the update, plus
    `env_advantages` [...] if there is an environment's reward too. All other arguments are those of
    `policy_gradient_loss`; a weight in `mask` counts once, in the loss.

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
        power=power,
    )
    if env_advantages is not None:
        advantages = advantages + _advantages("env_advantages", env_advantages, hidden, options["sequence_ids"])
    output = policy_gradient_loss(hidden, weight, tokens, advantages, sampler_logprobs, **options)
    gap = sampler_logprobs.detach() - teacher_logprobs.detach()
    return output._replace(metrics={**output.metrics, "teacher_kl": masked_mean(gap, active)})


def _surrogate(options: PolicyOptions) -> Surrogate:
    bounds = options["ratio_bounds"]
    if bounds is None:
        return record(Surrogate, options)
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or None in bounds:
        raise ValueError(f"ratio_bounds is {bounds!r}; expected (low, high), where 0 and inf leave a side open")
    for bound in bounds:
        check.check_number("ratio_bounds", bound)
    return record(Surrogate, {**options, "ratio_bounds": RatioBounds(*bounds)})


def _check_what_belongs_together(old_logprobs: Tensor | None, options: PolicyOptions) -> None:
    """What needs a ratio needs old log-probs, and a KL to a reference needs the reference's."""
    if options["ratio"] not in RATIOS:
        raise ValueError(f"ratio is {options['ratio']!r}; use one of {', '.join(RATIOS)}")
    for name in ("truncate_ratio", "ratio_bounds"):
        if old_logprobs is None and options.get(name) is not None:
            raise ValueError(f"{name} is {options.get(name)} and needs old_logprobs: without them every ratio is 1")
    if options["ref_kl_coef"] != 0.0 and options["ref_logprobs"] is None:
        raise ValueError(
            f"ref_kl_coef is {options['ref_kl_coef']} and needs ref_logprobs, those of the reference model"
        )


def _advantages(name: str, advantages: Tensor, hidden: Tensor, sequence_ids: Tensor | None) -> Tensor:
    """One entry per token, detached; one per row along the last dimension is expanded."""
    check.check_tensor(name, advantages)
    shape = hidden.shape[:-1]
    expanded = check.per_token(advantages, shape)
    if expanded is not advantages and sequence_ids is not None:
        raise ValueError(
            f"{name} is {list(advantages.shape)}, one per row, and sequence_ids says that a row holds several sequences: "
            f"expected one entry per token, {list(shape)}"
        )
    return check.check_per_token(name, expanded, hidden)


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


def _sequence_log_ratios(call: Call, old: Tensor, sequences: Sequences) -> Tensor:
    """Of each token [N] the mean log-ratio of its sequence, by a forward pass of its own."""
    logprobs = -evaluate(Problem(call.inputs, call.spec, rows=call.rows()))[0]
    return sequences.mean(log_ratio(logprobs, old), call.active)


def _metrics(row_loss: RowLoss, logprobs: Tensor, active: Tensor) -> dict[str, Tensor]:
    """k1 and k3 are estimates from each token's own log-probs, whatever the loss takes its ratio of."""
    surrogate, advantages, ref = row_loss.surrogate, row_loss.advantages, row_loss.ref_logprobs
    assert surrogate is not None
    assert advantages is not None
    own = log_ratio(logprobs, row_loss.old_logprobs)
    log_ratios = own if row_loss.log_ratios is None else row_loss.log_ratios
    ratio = importance_ratio(log_ratios, surrogate.truncate_ratio)
    terms = surrogate_terms(surrogate, logprobs, log_ratios, advantages)
    own = bounded(own)

    def share(which: Tensor) -> Tensor:
        return masked_mean(which.to(logprobs.dtype), active)

    metrics = {
        **ratio_metrics(ratio.whole, active),
        "clip_fraction": share(terms.clipped),
        "k1": masked_mean(-own, active),
        "k3": masked_mean(k3(own), active),
    }
    if surrogate.method in ("ppo", "cispo"):
        metrics["clip_low_fraction"] = share((ratio.value < 1.0 - surrogate.clip_low) & (advantages < 0))
        metrics["clip_high_fraction"] = share((ratio.value > 1.0 + surrogate.clip_high) & (advantages > 0))
    if surrogate.ratio_bounds is not None:
        metrics["out_of_bounds_fraction"] = share(terms.outside)
    if ref is not None:
        metrics["ref_kl"] = masked_mean(reference_kl(surrogate, logprobs, ref, ratio).value, active)
    return metrics
