"""Every loss once more as plain PyTorch: the specification, the oracle of the tests, the baseline of the benches.

Written the way one would write it without caring for memory: all logits at once, any dtype, gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """z [..., V], in the dtype of `hidden`."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def logprobs(z: Tensor, tokens: Tensor, ignore_index: int = -100) -> Tensor:
    """log softmax(z)[tokens] [...]; 0 at ignored tokens."""
    counted = tokens != ignore_index
    index = tokens.where(counted, 0)[..., None]
    return torch.log_softmax(z, -1).gather(-1, index).squeeze(-1).where(counted, 0.0)


def reverse_kl_advantages(
    sampler_logprobs: Tensor,  # [T], one sequence
    teacher_logprobs: Tensor,  # [T]
    mask: Tensor,  # [T]
    coef: float = 1.0,
    discount: float = 0.0,
    power: float = 0.0,
) -> Tensor:
    """A_i = −coef Σ_k discountᵏ d_{i+k} for the unmasked tokens, by the recursion y_i = d_i + discount · y_{i+1}."""
    future, total = torch.zeros_like(sampler_logprobs), sampler_logprobs.new_zeros(())
    for i in reversed(range(len(sampler_logprobs))):
        difference = sampler_logprobs[i] - teacher_logprobs[i]
        if power > 0.0:
            difference = (torch.exp(power * sampler_logprobs[i]) - torch.exp(power * teacher_logprobs[i])) / power
        total = total * discount + (mask[i] * difference if mask[i] != 0 else 0.0)
        future[i] = total if mask[i] != 0 else 0.0
    return -coef * future


def redistributed_advantages(
    advantages: Tensor, sampler_logprobs: Tensor, teacher_logprobs: Tensor, share: float, clip: float
) -> Tensor:
    """A ((1 − λ) + λ clip((q / p)^sign(A), 1 − ε, 1 + ε)) of each token, λ = share, ε = clip."""
    ratio = torch.exp(teacher_logprobs) / torch.exp(sampler_logprobs)
    weight = torch.where(advantages < 0, 1.0 / ratio, ratio).clamp(1.0 - clip, 1.0 + clip)
    return advantages * ((1.0 - share) + share * weight)


def importance_ratio(
    logprobs: Tensor,  # [...], differentiable
    old_logprobs: Tensor | None = None,
    truncate_ratio: float | None = None,
) -> Tensor:
    """exp(logprobs − old_logprobs) [...], constant where the log-ratio is beyond ±20; truncated, the gradient goes on."""
    log_ratio = _log_ratio(logprobs, logprobs.detach() if old_logprobs is None else old_logprobs)
    ratio = torch.exp(log_ratio.clamp(-20.0, 20.0))
    if truncate_ratio is None:
        return ratio
    own = _log_ratio(logprobs, logprobs.detach())  # 0, with a gradient
    return torch.where(ratio > truncate_ratio, truncate_ratio * torch.exp(own), ratio)


def reference_kl(logprobs: Tensor, ref_logprobs: Tensor, ref_kl: str = "k3") -> Tensor:
    """Per token [...], from the token alone; constant where the log-ratio is beyond ±20."""
    d = _log_ratio(ref_logprobs, logprobs).clamp(-20.0, 20.0)
    return {"k1": -d, "k2": 0.5 * d.square(), "k3": torch.expm1(d) - d}[ref_kl]


def _log_ratio(logprobs: Tensor, others: Tensor) -> Tensor:
    """Equal probabilities have the ratio 1, even of an impossible token. Its gradient is that of a barely possible one."""
    difference = logprobs - others
    with torch.no_grad():  # the value alone is mended
        difference.masked_fill_(logprobs.isinf() & (logprobs == others), 0.0)
    return difference


def policy_gradient(
    logprobs: Tensor,  # [...], differentiable
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    method: str = "importance_sampling",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    truncate_ratio: float | None = None,
    ratio_bounds: tuple[float, float] = (0.0, float("inf")),
    ref_logprobs: Tensor | None = None,
    ref_kl_coef: float = 0.0,
    ref_kl: str = "k3",
    ref_kl_ratio: bool = False,
    bonus: Tensor | float = 0.0,  # of a token's loss
) -> Tensor:
    """Loss per token [...]; its gradient by `logprobs` is autograd's."""
    whole, ratio = (importance_ratio(logprobs, old_logprobs, cap) for cap in (None, truncate_ratio))
    loss = _surrogate(logprobs, ratio, advantages, method, clip_low, clip_high, dual_clip, truncate_ratio) - bonus
    if ref_logprobs is not None:
        kl = reference_kl(logprobs, ref_logprobs, ref_kl)
        loss = loss + ref_kl_coef * (ratio * kl if ref_kl_ratio else kl)
    outside = (whole < ratio_bounds[0]) | (whole > ratio_bounds[1])
    return loss.where(~outside, 0.0)


def _surrogate(
    logprobs: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    method: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    truncate_ratio: float | None,
) -> Tensor:
    clip = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if method == "importance_sampling":
        return -ratio * advantages
    if method == "reinforce":
        return -advantages * logprobs * (1.0 if truncate_ratio is None else ratio.detach())
    if method == "cispo":
        return -clip.detach() * advantages * logprobs
    loss = -torch.minimum(ratio * advantages, clip * advantages)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def common_vocabulary(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V_t]
    student_ids: Tensor,  # [C], distinct
    teacher_ids: Tensor,  # [C], the same tokens
) -> tuple[Tensor, Tensor]:
    """Student and teacher over the common tokens and one outcome for each one's rest, as logits [..., C + 1] of the losses.

    A student without other tokens has no such outcome: then [..., C], of what the teacher gives to common tokens. A teacher
    without has 16 eps there.
    """
    log_p, log_q = (torch.log_softmax(z, -1) for z in (student_logits, teacher_logits))
    if log_p.shape[-1] == len(student_ids):
        return log_p[..., student_ids], log_q[..., teacher_ids]
    p_rest, q_rest = (
        z.index_fill(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        for z, ids in ((log_p, student_ids), (log_q, teacher_ids))
    )
    if log_q.shape[-1] == len(teacher_ids):
        q_rest = torch.full_like(q_rest, 16 * torch.finfo(q_rest.dtype).eps).log()
    return torch.cat([log_p[..., student_ids], p_rest], -1), torch.cat([log_q[..., teacher_ids], q_rest], -1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ p (log p − log q) per row [...]; 0 · log 0 = 0."""
    log_p, log_q = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Σ q (log q − log p) per row [...]; 0 · log 0 = 0."""
    log_p, log_q = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(-1)


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(q‖m) + (1 − β) KL(p‖m) per row [...], m = βq + (1 − β)p."""
    p, q = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    m = beta * q + (1.0 - beta) * p
    return beta * _kl(q, m) + (1.0 - beta) * _kl(p, m)


def skewed_forward_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(q ‖ αq + (1 − α)p) per row [...]."""
    p, q = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    return _kl(q, alpha * q + (1.0 - alpha) * p)


def skewed_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
    """KL(p ‖ αp + (1 − α)q) per row [...]."""
    p, q = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    return _kl(p, alpha * p + (1.0 - alpha) * q)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """½ Σ |p − q| per row [...]."""
    return 0.5 * (torch.softmax(student_logits, -1) - torch.softmax(teacher_logits, -1)).abs().sum(-1)


def density_power(student_logits: Tensor, teacher_logits: Tensor, power: float) -> Tensor:
    """Σ [p¹⁺ᵅ / (1 + α) − p qᵅ + α q¹⁺ᵅ / (1 + α)] / α per row [...], α = power > 0; its limit, the reverse KL, at 0.

    p¹⁺ᵅ / (α (1 + α)) is p¹⁺ᵅ / α − p¹⁺ᵅ / (1 + α): so the terms cancel less.
    """
    if power == 0.0:
        return reverse_kl(student_logits, teacher_logits)
    p, q = torch.softmax(student_logits, -1), torch.softmax(teacher_logits, -1)
    own, theirs = p ** (1.0 + power), q ** (1.0 + power)
    return ((own - p * q**power) / power - (own - theirs) / (1.0 + power)).sum(-1)


def cross_entropy(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...] int64
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
) -> Tensor:
    """(1 − ε) c[y] (−log p[y]) + ε/V Σ c (−log p) + z_loss lse² per row [...], 0 · ∞ = 0; 0 at ignored targets."""
    c = torch.ones_like(logits) if class_weight is None else class_weight.to(logits.dtype).expand_as(logits)
    counted = targets != ignore_index
    costs = torch.where(c == 0, 0.0, -c * torch.log_softmax(logits, -1))
    own = costs.gather(-1, targets.where(counted, 0)[..., None]).squeeze(-1)
    smoothed = (1.0 - label_smoothing) * own if label_smoothing < 1.0 else torch.zeros_like(own)
    if label_smoothing > 0.0:
        smoothed = smoothed + label_smoothing * costs.mean(-1)
    return (smoothed + z_loss * torch.logsumexp(logits, -1).square()).where(counted, 0.0)


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p per row [...]; 0 · log 0 = 0."""
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


def top_k_kl(
    student_logits: Tensor,  # [..., V]
    ids: Tensor,  # [..., k]; −1 pads
    teacher_logprobs: Tensor,  # [..., k]
    direction: str = "reverse",
    tail: str = "bucket",
) -> Tensor:
    """Per row [...], from listed tokens and one outcome for all others; `fastkl.loss.top_k_kl_loss` says which terms.

    Of the teacher's remaining mass 1 − Σ q, 16 eps may be rounding: no less is divided by, and no less is weighed with.
    """
    p, q, p_rest, q_rest = _listed(student_logits, ids, teacher_logprobs)
    least = 16 * torch.finfo(q.dtype).eps
    q_rest = q_rest.clamp(min=least) if direction == "reverse" else q_rest.where(q_rest > least, 0.0)
    if tail == "bucket":
        p, q = torch.cat([p, p_rest], -1), torch.cat([q, q_rest], -1)
    outside = torch.zeros_like(p_rest)
    if tail == "renormalise":
        inside = p.sum(-1, keepdim=True)
        p, q, outside = p / inside, q / q.sum(-1, keepdim=True), -torch.log(inside)
    return (_kl(p, q) if direction == "reverse" else _kl(q, p)) + outside.squeeze(-1)


def sampled_tail(
    student_logits: Tensor,  # [..., V]
    ids: Tensor,  # [..., k]; −1 pads
    teacher_logprobs: Tensor,  # [..., k]
    tokens: Tensor,  # [...]
    token_teacher_logprobs: Tensor,  # [...]
    sampler_logprobs: Tensor | None = None,  # [...]
    tail_baseline: Tensor | float | None = None,  # [...] or a number
    tail_weight: float = 1.0,
    truncate_ratio: float | None = None,
) -> Tensor:
    """Per row [...], what sampled tokens add to `top_k_kl` (reverse, bucket): w (r 1[y∉K] (d_y − ρ − c) + c (1 − P)).

    The factor of r is a constant for autograd. It is 0 where the student cannot emit the token.
    """
    _, q, p_rest, q_rest = _listed(student_logits, ids, teacher_logprobs)
    p_rest, q_rest = p_rest.squeeze(-1), q_rest.squeeze(-1).clamp(min=16 * torch.finfo(q.dtype).eps)
    c = 0.0 if tail_baseline is None else tail_baseline
    own = logprobs(student_logits, tokens)
    counted = ((ids < 0) | (ids != tokens[..., None])).all(-1) & (own > -torch.inf)
    rho = torch.where(p_rest > 0, p_rest, q_rest).log() - q_rest.log()
    excess = torch.where(counted, _log_ratio(own, token_teacher_logprobs) - rho - c, 0.0).detach()
    return tail_weight * (importance_ratio(own, sampler_logprobs, truncate_ratio) * excess + c * p_rest)


def _listed(student_logits: Tensor, ids: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities of student and teacher on the list [..., k], 0 where padded, and their masses outside [..., 1]."""
    listed, rest = ids >= 0, torch.ones_like(student_logits, dtype=torch.bool)
    rest = rest.scatter(-1, ids.where(listed, ids[..., :1]), False)
    probabilities = torch.softmax(student_logits, -1)
    p = probabilities.gather(-1, ids.clamp(min=0)).where(listed, 0.0)
    q = teacher_logprobs.exp().where(listed, 0.0)
    return p, q, (probabilities * rest).sum(-1, keepdim=True), 1.0 - q.sum(-1, keepdim=True)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q) of probabilities, q > 0 where p > 0; 0 · log 0 = 0."""
    return (p * (torch.where(p > 0, p, 1.0) / torch.where(p > 0, q, 1.0)).log()).sum(-1)


def reduce(losses: Tensor, mask: Tensor, reduction: str = "mean", normalizer: Tensor | float | None = None) -> Tensor:
    """The tokens' losses weighted by `mask` and reduced; a mean over nothing is 0."""
    losses = torch.where(mask != 0, losses * mask, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (mask.sum().clamp(min=1e-30) if normalizer is None else normalizer)
