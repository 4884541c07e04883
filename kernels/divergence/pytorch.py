"""Divergences (`formula.py`) in plain PyTorch, for every device: in place, a block of rows at a time.

A formula is given the log-probs of a block. It returns the value of each row and, if a gradient is wanted, leaves the
gradient by z in the place of log p. On a CPU passes over a block are what costs, next to them exponentials: mixtures are
made of probabilities, not of their logarithms.

A block may have the ids of one process of several (`rows/parallel/vocabulary.py`). Each formula therefore hands its sums
over the ids to `total`, all in one call, before it makes a gradient of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import Divergence, HardTarget, Mixture, Outputs, effective_kind, mixture
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.parallel.vocabulary import WHOLE, Vocabulary
from fastkl.kernels.rows.pytorch import apply_cap, hand_over, undo_cap

Total = Callable[[Tensor], Tensor]  # [n] or [k, n] -> the same, summed over the ids of all processes


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

    The gradient is that of the divergence and of the hard target together.
    """
    assert logits.teacher is not None
    formula, vocabulary = _FORMULAS[effective_kind(kind, parameter)], logits.vocabulary
    for rows in vocabulary.blocks(logits.student):
        log_p, log_q = logits.student[rows], logits.teacher[rows]
        z = apply_cap(log_p, logits.student_cap, keep=gradient is not None)
        apply_cap(log_q, logits.teacher_cap, keep=False)
        hard_log_p = None if hard is None else log_p * hard.power
        vocabulary.log_softmaxes(log_p, log_q, *([] if hard_log_p is None else [hard_log_p]))
        y = None if tokens is None else tokens[rows, None]
        value, token_nll, by_products, hard_nll = Outputs.of(out[:, rows])
        token_nll.copy_(_nll(log_p, y, vocabulary))
        if hard_log_p is not None and hard_nll is not None:
            hard_nll.copy_(_nll(hard_log_p, y, vocabulary))
        agreement = _describe(log_p, log_q, y, by_products, vocabulary) if by_products else None
        value.copy_(formula(log_p, log_q, parameter, gradient is not None, _total_with(out[1:, rows], vocabulary)))
        if agreement is not None:
            by_products["top1_agreement"].copy_(agreement).masked_fill_(by_products["reverse_kl"].isnan(), torch.nan)
        if hard is not None and hard_log_p is not None and gradient is not None and y is not None:
            p = hard_log_p.exp_()
            vocabulary.subtract(p, y, p.new_ones((1, 1)).expand_as(y))
            log_p.add_(p, alpha=hard.coef * hard.power)
        if gradient is not None:
            undo_cap(log_p, z, logits.student_cap)
            hand_over(log_p, gradient[rows])


def _total_with(values: Tensor, vocabulary: Vocabulary) -> Total:
    """`Vocabulary.total`, which makes these values [k, n] whole too: one exchange for what a formula sums and for them."""

    def total(sums: Tensor) -> Tensor:
        rows = torch.atleast_2d(sums)
        whole = vocabulary.total(torch.cat([rows, values]))
        values.copy_(whole[len(rows) :])
        return whole[: len(rows)].view_as(sums)

    return (lambda sums: sums) if vocabulary is WHOLE else total


def _describe(
    log_p: Tensor, log_q: Tensor, y: Tensor | None, by_products: dict[str, Tensor], vocabulary: Vocabulary
) -> Tensor:
    """Sums over the block's ids. Returns the agreement [n], which is of all ids."""
    p, q = log_p.exp(), log_q.exp()
    by_products["teacher_logprobs"].copy_(-_nll(log_q, y, vocabulary))
    by_products["student_entropy"].copy_(_mean(p, log_p.neg()))
    by_products["teacher_entropy"].copy_(_mean(q, log_q.neg()))
    by_products["reverse_kl"].copy_(_mean(p, log_p - log_q))
    by_products["forward_kl"].copy_(_mean(q, log_q - log_p))
    ours, theirs = vocabulary.first_largest(log_p, log_q)
    return ours == theirs


def _nll(log_p: Tensor, y: Tensor | None, vocabulary: Vocabulary) -> Tensor:
    """Of the block's ids: 0 where the token is none of them."""
    return log_p.new_zeros(log_p.shape[0]) if y is None else -vocabulary.part(log_p, y).squeeze(1)


def _mean(p: Tensor, f: Tensor) -> Tensor:
    """Σ p f with 0 · ∞ = 0; f becomes 0 where it is infinite and p = 0.

    The mask for that is two passes; a row that needs it shows up as NaN, and looking costs nothing on a CPU.
    """
    mean = torch.linalg.vecdot(p, f)
    if mean.is_cpu and not mean.isnan().any():
        return mean
    f.masked_fill_(p == 0, 0.0)
    return torch.linalg.vecdot(p, f)


def _reverse_kl(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    log_ratio = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    value = total(_mean(p, log_ratio))
    if gradient:
        p.mul_(log_ratio.sub_(value[:, None]))
    return value


def _forward_kl(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    log_ratio = log_q - log_p
    q = log_q.exp_()
    value = total(_mean(q, log_ratio))
    if gradient:
        log_p.exp_().sub_(q)
    return value


def _jsd(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    m = mixture("jsd", parameter)
    p, q = log_p.exp_(), log_q.exp_()
    mixed = _mix(p, q, m)
    quotient = q / mixed
    of_q = torch.linalg.vecdot(q, _log(quotient, out=quotient))
    quotient = torch.div(p, mixed, out=mixed)
    log_quotient = _log(quotient, out=quotient)
    of_q, of_p = total(torch.stack([of_q, torch.linalg.vecdot(p, log_quotient)]))
    if gradient:
        _times_centred(p, log_quotient, of_p, m.student)
    return m.teacher * of_q + m.student * of_p


def _skewed_forward_kl(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    m = mixture("skewed_forward_kl", parameter)
    p, q = log_p.exp_(), log_q.exp_()
    mixed = _mix(p, q, m)
    quotient = torch.div(q, mixed, out=mixed)
    value = torch.linalg.vecdot(q, _log(quotient))
    if not gradient:
        return total(value)
    s = quotient.sub_(1.0)
    value, mean = total(torch.stack([value, torch.linalg.vecdot(p, s)]))
    _times_centred(p, s, mean, -m.student)
    return value


def _skewed_reverse_kl(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    m = mixture("skewed_reverse_kl", parameter)
    p, q = log_p.exp_(), log_q.exp_()
    mixed = _mix(p, q, m)
    quotient = torch.div(p, mixed, out=mixed)
    log_quotient = _log(quotient, out=q)
    value = torch.linalg.vecdot(p, log_quotient)
    if not gradient:
        return total(value)
    s = log_quotient.sub_(quotient.sub_(1.0), alpha=m.student)
    value, mean = total(torch.stack([value, torch.linalg.vecdot(p, s)]))
    _times_centred(p, s, mean, 1.0)
    return value


def _total_variation(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    p, q = log_p.exp_(), log_q.exp_()
    difference = torch.sub(p, q, out=q)
    sign = difference.sign()  # of NaN: 0
    value = 0.5 * torch.linalg.vecdot(sign, difference)  # vector_norm sums one after the other and loses digits
    if not gradient:
        return total(value)
    value, mean = total(torch.stack([value, torch.linalg.vecdot(p, sign)]))
    _times_centred(p, sign, mean + 0.0 * value, 0.5)
    return value


def _density_power(log_p: Tensor, log_q: Tensor, parameter: float, gradient: bool, total: Total) -> Tensor:
    """With P the larger of p and q and |r| = |log(p/q)|, pᵅ − qᵅ = ± Pᵅ (1 − e^(−α |r|)), and so for 1 + α."""
    for log_side in (log_p, log_q):
        log_side.clamp_(min=torch.finfo(log_p.dtype).min / 4)  # so that r = 0 where neither side can emit the token
    log_peak = torch.maximum(log_p, log_q)
    r = torch.sub(log_p, log_q, out=log_q)
    size = r.abs()
    both = _share(size, 1.0 + parameter).mul_(torch.exp(log_peak * (1.0 + parameter))).copysign_(r).sum(-1)
    s = _share(size, parameter).mul_(log_peak.mul_(parameter).exp_()).copysign_(r)
    p = log_p.exp_()
    mean, both = total(torch.stack([torch.linalg.vecdot(p, s), both]))
    if gradient:
        _times_centred(p, s, mean, 1.0)
    return mean - both


def _share(r: Tensor, power: float) -> Tensor:
    """(1 − e^(−power · r)) / power."""
    return torch.mul(r, -power).expm1_().div_(-power)


_FORMULAS: dict[Divergence, Callable[[Tensor, Tensor, float, bool, Total], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": _total_variation,
    "density_power": _density_power,
}


def _mix(p: Tensor, q: Tensor, m: Mixture) -> Tensor:
    """m, and p exactly where p = q; the smallest number where that is 0, so that it can divide.

    `lerp` takes the smaller weight: 1 − weight would lose digits of it.
    """
    mixed = torch.lerp(p, q, m.teacher) if m.teacher < m.student else torch.lerp(q, p, m.student)
    return mixed.clamp_(min=torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps)


def _log(quotient: Tensor, out: Tensor | None = None) -> Tensor:
    """Finite where the quotient is 0: what it is multiplied with is 0 there, too."""
    return torch.clamp(quotient, min=torch.finfo(quotient.dtype).tiny, out=out).log_()


def _times_centred(p: Tensor, s: Tensor, mean: Tensor, factor: float) -> None:
    """p becomes factor · p (s − mean); s is lost."""
    centred = torch.add(mean.mul(-factor)[:, None], s, alpha=factor, out=s)
    p.mul_(centred)
