"""The advantages of on-policy distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.numbers import check_logprobs
from fastkl._loss.sequences import future_sums


def reverse_kl_advantages(
    sampler_logprobs: Tensor,  # [..., T]
    teacher_logprobs: Tensor,  # [..., T]
    mask: Tensor | None = None,  # [..., T]
    *,
    coef: float = 1.0,
    discount: float = 0.0,
    sequence_ids: Tensor | None = None,
    baseline: Tensor | None = None,  # [..., T]
) -> Tensor:
    """Advantages [..., T] of on-policy distillation: A_i = −coef · (Σ_{k≥0} discountᵏ d_{i+k} − mask_i · baseline_i).

    d = mask · (sampler_logprobs − teacher_logprobs) is the one-sample estimate of the reverse KL at a token (Thinking
    Machines, "On-Policy Distillation", 2025); with discount 0 a token answers for itself alone. The sum runs along the
    last dimension. `sequence_ids` [..., T] (integers) tells the sequences of a packed row apart: equal ids stand
    together, and no sum crosses from one to the next. The advantage of a masked token is 0, whatever its log-probs hold;
    it still takes one step of the discount.

    `baseline` is a control variate (0 by default): what does not depend on the token itself leaves the policy gradient's
    mean as it is. With the expectation of d_i, the exact KL(sampler ‖ teacher) at the position
    (`LossOutput.per_token.reverse_kl` of a divergence), the gradient varies less where that KL is large, as at the start
    of a distillation (0.4 to 0.6 of the variance at 2 to 5 nats on random logits), and no less where it is small (1.0 to
    1.2 below half a nat). Only a token's own baseline is taken off: later ones depend on it.

    Returns float32 (float64 for float64 log-probs), detached. Raises TypeError or ValueError for what does not fit, on a
    CPU also for log-probs above 0 or NaN where the mask is not 0.
    """
    for name, logprobs in (("sampler_logprobs", sampler_logprobs), ("teacher_logprobs", teacher_logprobs)):
        check.check_tensor(name, logprobs)
    check.check_finite("coef", coef)
    dtype = torch.promote_types(torch.promote_types(sampler_logprobs.dtype, teacher_logprobs.dtype), torch.float32)
    others = {"teacher_logprobs": teacher_logprobs, "mask": mask, "sequence_ids": sequence_ids, "baseline": baseline}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != sampler_logprobs.shape:
            raise ValueError(f"{name} is {list(tensor.shape)} but sampler_logprobs is {list(sampler_logprobs.shape)}")
        if tensor is not None:
            check.check_device(name, tensor, sampler_logprobs, "sampler_logprobs")
    if sequence_ids is not None:
        check.check_integers("sequence_ids", sequence_ids)
    check.check_number("discount", discount)
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it must be in [0, 1]")
    for name, logprobs in (("sampler_logprobs", sampler_logprobs), ("teacher_logprobs", teacher_logprobs)):
        check_logprobs(name, logprobs, None if mask is None else mask != 0)
    difference = sampler_logprobs.detach().to(dtype) - teacher_logprobs.detach().to(dtype)
    if mask is not None:
        difference = (difference * mask).where(mask != 0, 0.0)
    if discount > 0.0 and difference.dim() > 0:
        difference = future_sums(difference, discount, sequence_ids)
    if baseline is not None:
        own = baseline.detach().to(dtype)
        difference = difference - (own if mask is None else (own * mask).where(mask != 0, 0.0))
    advantages = -coef * difference
    return advantages if mask is None else advantages.where(mask != 0, 0.0)
