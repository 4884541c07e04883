"""The advantages of on-policy distillation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.numbers import check_logprobs
from fastkl._loss.sequences import Sequences, future_sums
from fastkl.kernels.divergence.formula import check_power


def reverse_kl_advantages(
    sampler_logprobs: Tensor,  # [..., T]
    teacher_logprobs: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    coef: float = 1.0,
    discount: float = 0.0,
    sequence_ids: Tensor | None = None,
    baseline: Tensor | None = None,  # [..., T]
    power: float = 0.0,
) -> Tensor:
    """Advantages [..., T] of on-policy distillation: A_i = −coef · (Σ_{k≥0} discountᵏ d_{i+k} − mask_i · baseline_i).

    d = mask · (sampler_logprobs − teacher_logprobs) is the one-sample estimate of the reverse KL at a token (Thinking
    Machines, "On-Policy Distillation", 2025); with discount 0 a token answers for itself alone. The sum runs along the
    last dimension. `sequence_ids` [..., T] (integers) tells the sequences of a packed row apart: equal ids stand
    together, and no sum crosses from one to the next. The advantage of a masked token is 0, whatever its log-probs hold;
    it still takes one step of the discount.

    `power` α in [0, 1000] bounds it: d = mask · (pᵅ − qᵅ) / α of the token's probabilities p (sampler) and q (teacher), the
    reward of PowerOPD (Zhao et al., 2026) negated and divided by α. |d| ≤ mask / α, also where q is 0. α → 0 gives the d
    above, which is α = 0. Its mean gradient is that of `density_power_loss` with the same power: docs/losses/losses.md
    has the proof.

    `baseline` is a control variate (0 by default): what does not depend on the token itself leaves the policy gradient's
    mean as it is. With the expectation of d_i, at power 0 the exact KL(sampler ‖ teacher) at the position
    (`LossOutput.per_token.reverse_kl` of a divergence), the gradient varies less where that KL is large, as at the start
    of a distillation (0.4 to 0.6 of the variance at 2 to 5 nats on random logits), and no less where it is small (1.0 to
    1.2 below half a nat). Only a token's own baseline is taken off: later ones depend on it. With a power that KL leaves
    the mean as it is too, but has another scale than d. `centred_advantages` goes with every power.

    Returns float32 (float64 for float64 log-probs), detached. Raises TypeError or ValueError for what does not fit, on a
    CPU also for log-probs above 0 or NaN where the mask is not 0.
    """
    check.check_number("power", power)
    check_power(power)
    policies = {"sampler_logprobs": sampler_logprobs, "teacher_logprobs": teacher_logprobs}
    ours, theirs = _logprobs(policies, mask)
    difference = ours - theirs if power == 0.0 else _power_difference(ours, theirs, float(power))
    return _advantages(difference, mask, coef, discount, sequence_ids, baseline)


def extrapolated_advantages(
    sampler_logprobs: Tensor,  # [..., T]
    teacher_logprobs: Tensor,  # [..., T]
    ref_logprobs: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    extrapolate: float,
    coef: float = 1.0,
    discount: float = 0.0,
    sequence_ids: Tensor | None = None,
    baseline: Tensor | None = None,  # [..., T]
) -> Tensor:
    """Advantages [..., T] that go past the teacher, away from a reference model: of one token, with λ = `extrapolate` ≥ 0,

        A = λ (log q − log r) − (log p − log r)        p: sampler, q: teacher, r: reference

    The reward of G-OPD, ExOPD for λ > 1 (Yang et al., "Learning beyond Teacher", 2026). Its mean gradient is that of the
    reverse KL to softmax(λ log q + (1 − λ) log r) over the vocabulary. λ = 1 is `reverse_kl_advantages`, λ = 0 the reverse
    KL to the reference. The reference is usually what the teacher was trained from, or the student before its training.

    Everything else is as in `reverse_kl_advantages`, with d = −mask · A of one token. A reference that forbids what was
    sampled (r = 0) makes A +inf for λ > 1, −inf for λ < 1: mask such tokens out.
    """
    check.check_finite("extrapolate", extrapolate)
    if extrapolate < 0.0:
        raise ValueError(f"extrapolate is {extrapolate}; it must be >= 0 (1: the teacher itself, 0: the reference)")
    policies = {
        "sampler_logprobs": sampler_logprobs,
        "teacher_logprobs": teacher_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    ours, theirs, ref = _logprobs(policies, mask)
    difference = ours
    for weight, logprobs in ((float(extrapolate), theirs), (1.0 - float(extrapolate), ref)):
        if weight != 0.0:  # 0 · −inf is 0
            difference = difference - weight * logprobs
    return _advantages(difference, mask, coef, discount, sequence_ids, baseline)


def centred_advantages(
    advantages: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    sequence_ids: Tensor | None = None,
) -> Tensor:
    """The mean as baseline: A_i − mask_i · b [..., T], b the mean Σ A / Σ mask over the tokens of all *other* sequences.

    What other sequences sampled does not depend on the token, so that the policy gradient keeps its mean exactly: the
    baseline of RLOO (Kool et al., 2019; Ahmadian et al., 2024), per token. The plain mean of the batch would shrink the
    gradient, the more the fewer sequences there are. `advantages` may be those of any function here, of rewards, or sums.
    A row along the last dimension is a sequence, or holds several, told apart by `sequence_ids` as in
    `reverse_kl_advantages`. A sequence without others keeps its advantages. Masked tokens get 0, whatever they hold. An
    infinite advantage makes the mean infinite for all other sequences: bound it (`power`, a clip), or mask it out.

    Give all sequences of a step in one call. Returns float32 (float64 for float64), detached, without a synchronisation.
    Raises TypeError or ValueError for what does not fit.
    """
    check.check_real("advantages", advantages)
    if advantages.dim() == 0:
        raise ValueError("advantages is a single number, which makes no sequence: expected [..., T]")
    _check_alike("advantages", advantages, {"mask": mask, "sequence_ids": sequence_ids})
    dtype = torch.promote_types(advantages.dtype, torch.float32)
    weights = torch.ones_like(advantages, dtype=torch.float64) if mask is None else mask.detach().double()
    active = weights != 0
    values = advantages.detach().double().where(active, 0.0)
    sequences = Sequences(advantages, sequence_ids)
    total, count = (sequences.sum_of_others(x.reshape(-1)).reshape(x.shape) for x in (values, weights))
    centred = values - weights * (total / count).where(count > 0, 0.0)
    return centred.where(active, 0.0).to(dtype)


def redistributed_advantages(
    advantages: Tensor,  # [..., T], or one for each row, [...] or [..., 1]
    sampler_logprobs: Tensor,  # [..., T]
    teacher_logprobs: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    share: float,
    clip: float = 0.2,
) -> Tensor:
    """Advantages [..., T] that the teacher's gap spreads unevenly over the tokens. Of one token, λ = `share`, ε = `clip`,

        A' = A · ((1 − λ) + λ · clip(exp(sign(A) · Δ), 1 − ε, 1 + ε))        Δ = log q − log p

    with p the sampler's probability of the token and q the teacher's. RLSD (Yang et al., "Self-Distilled RLVR", 2026):
    the reward says whether a sample is encouraged, the teacher says which of its tokens count most. What the teacher
    finds likelier than the sampler did counts more where A > 0, and less where A < 0. The factor is positive: no sign
    changes. |A'| is between (1 − λε) |A| and (1 + λε) |A|. The sum over a sequence is not kept.

    A may be one number for each row, as a reward is. λ in [0, 1]: 0 leaves A as it is. ε in [0, 1): 0 does too. The
    advantage of a masked token is 0, whatever is there; there is no other use of the mask. Returns float32 (float64 where
    an argument is), detached. Raises TypeError or ValueError for what does not fit, on a CPU also for log-probs above 0 or
    NaN where the mask is not 0.
    """
    policies = {"sampler_logprobs": sampler_logprobs, "teacher_logprobs": teacher_logprobs}
    ours, theirs = _logprobs(policies, mask)
    own = check.per_token(check.check_real("advantages", advantages), ours.shape)
    _check_alike("sampler_logprobs", ours, {"advantages": own})
    for name, number in (("share", share), ("clip", clip)):
        check.check_number(name, number)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share is {share}; it must be in [0, 1]")
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip is {clip}; it must be in [0, 1)")
    own = own.detach().to(torch.promote_types(ours.dtype, own.dtype))
    gap = (theirs - ours).where((theirs != ours) & (own != 0), 0.0)  # −inf is as impossible as −inf
    weight = torch.exp((own.sign() * gap).clamp(math.log1p(-clip), math.log1p(clip)))
    result = own * (1.0 - share + share * weight)
    return result if mask is None else result.where(mask != 0, 0.0)


def _check_alike(first: str, like: Tensor, others: dict[str, Tensor | None]) -> None:
    """Shapes and devices of tensors per token, ids that are integers, and weights of a mask."""
    for name, tensor in others.items():
        if tensor is None:
            continue
        check.check_real(name, tensor)
        if tensor.shape != like.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} but {first} is {list(like.shape)}")
        check.check_device(name, tensor, like, first)
        if name == "sequence_ids":
            check.check_integers(name, tensor)
        if name == "mask":
            check.check_weights(tensor)


def _logprobs(policies: dict[str, Tensor], mask: Tensor | None) -> list[Tensor]:
    """Log-probs of the same tokens, checked and detached, in one dtype."""
    dtype, (first, like) = torch.float32, next(iter(policies.items()))
    for name, logprobs in policies.items():
        check.check_floats(name, check.check_tensor(name, logprobs))
        dtype = torch.promote_types(dtype, logprobs.dtype)
    _check_alike(first, like, {**policies, "mask": mask})
    for name, logprobs in policies.items():
        check_logprobs(name, logprobs, None if mask is None else mask != 0)
    return [logprobs.detach().to(dtype) for logprobs in policies.values()]


def _power_difference(a: Tensor, b: Tensor, power: float) -> Tensor:
    """(exp(power · a) − exp(power · b)) / power of log-probs, without cancellation; a − b for a power near 0.

    With P the larger exponential and x = power · |a − b|, it is ± P (1 − e⁻ˣ) / power.
    """
    gap = (a.double() - b.double()).abs().where(a != b, 0.0)  # −inf is as impossible as −inf
    x = power * gap
    share = -torch.expm1(-x)
    size = torch.where(x < 1.0, gap * torch.where(x > 0.0, share / x, 1.0), share / power)
    size = size * torch.exp(power * torch.maximum(a, b).double().clamp(max=0.0))  # above 0 by rounding alone
    return torch.where(a < b, -size, size).to(a.dtype)


def _advantages(
    difference: Tensor,
    mask: Tensor | None,
    coef: float,
    discount: float,
    sequence_ids: Tensor | None,
    baseline: Tensor | None,
) -> Tensor:
    """−coef · (Σ_{k≥0} discountᵏ d_{i+k} − mask_i · baseline_i) with d = mask · difference."""
    check.check_finite("coef", coef)
    check.check_number("discount", discount)
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must be in [0, 1]")
    _check_alike("sampler_logprobs", difference, {"sequence_ids": sequence_ids, "baseline": baseline})
    if mask is not None:
        weights = mask.detach().to(difference.dtype)
        difference = (difference * weights).where(mask != 0, 0.0)
    if discount > 0.0 and difference.dim() > 0:
        difference = future_sums(difference, discount, sequence_ids)
    if baseline is not None:
        own = baseline.detach().to(difference.dtype)
        difference = difference - (own if mask is None else (own * weights).where(mask != 0, 0.0))
    advantages = -coef * difference
    return advantages if mask is None else advantages.where(mask != 0, 0.0)
