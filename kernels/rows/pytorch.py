"""Row functions (`interface.py`) in plain PyTorch, for every device.

They work in place, a block of rows at a time, so that what they need beside the chunk (a copy under a soft-cap, a mask, a
product) stays small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.parallel.vocabulary import peak_of, row_blocks

LOWEST_LOGPROB = -1e30  # times a probability of 0 it is 0


def token_nll(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = lse(z) − z[y]; gradient p − 1[y]."""
    assert tokens is not None
    vocabulary = logits.vocabulary
    for rows in vocabulary.blocks(logits.student):
        block, y = logits.student[rows], tokens[rows, None]
        z = apply_cap(block, logits.student_cap, keep=gradient is not None)
        peak, top, target = vocabulary.softmax(block, y)
        out[0, rows] = (peak - target) - top
        if gradient is not None:
            vocabulary.subtract(block, y, block.new_ones((1, 1)).expand_as(y))
            undo_cap(block, z, logits.student_cap)
            hand_over(block, gradient[rows])


def token_nll_entropy(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = −log p[y], out[1] = H = −Σ p log p, out[2] = m = max z, out[3] = lse(z) − m, out[4] = m − z[y].

    The chunk becomes log p.
    """
    assert tokens is not None
    assert gradient is None, "entropy_gradient makes it, once the weights are known"
    vocabulary = logits.vocabulary
    for rows in vocabulary.blocks(logits.student):
        block = logits.student[rows]
        apply_cap(block, logits.student_cap, keep=False)
        peak, top, target = vocabulary.log_softmax(block, tokens[rows, None])
        out[0, rows] = (peak - target) - top
        out[1, rows] = vocabulary.total(torch.special.entr(block.exp()).sum(-1))
        out[2, rows], out[3, rows], out[4, rows] = peak, -top, peak - target


def entropy_gradient(logits: Logits, tokens: Tensor, out: Tensor, weights: Tensor, gradient: Tensor) -> None:
    """w₀ (p − 1[y]) − w₁ p (log p + H) + w₂ p, the gradient of w₀ out[0] + w₁ out[1] + w₂ lse; weights [3, n]."""
    for rows in logits.vocabulary.blocks(logits.student):
        log_p, (w_nll, w_entropy, w_lse) = logits.student[rows], weights[:, rows, None]
        p = log_p.exp()
        z = None if logits.student_cap is None else log_p + (out[2] + out[3])[rows, None]
        of_p = w_nll + w_lse - w_entropy * out[1, rows, None]
        log_p.clamp_(min=LOWEST_LOGPROB).mul_(-w_entropy).add_(of_p).mul_(p)
        logits.vocabulary.subtract(log_p, tokens[rows, None], w_nll)
        undo_cap(log_p, z, logits.student_cap)
        hand_over(log_p, gradient[rows])


def clear_rows(gradient: Tensor, slope: Tensor) -> None:
    """The gradient becomes 0 in the rows whose slope is 0. On a CPU looking for them costs nothing."""
    idle = slope == 0
    if not gradient.is_cpu:
        gradient.masked_fill_(idle[:, None], 0.0)
    elif bool(idle.any()):
        gradient[idle] = 0.0


def tail_sums(logits: Logits, out: Tensor, power: float | None = None) -> None:
    """out[0] = m = max z, out[1] = Σ exp(z − m), out[2] = Σ exp(power (z − m)) (`top_k/formula.TailFunctions`)."""
    for rows in row_blocks(logits.student):
        z = _capped_entries(logits.student[rows], logits.student_cap)
        out[0, rows] = peak_of(z)
        out[1, rows] = _exponentials(z, out[0, rows]).sum(-1)
        if power is not None:
            out[2, rows] = _exponentials(z, out[0, rows], power).sum(-1)


def tail_gradient(
    logits: Logits,
    m: Tensor,
    scale: Tensor,
    gradient: Tensor,
    hard_scale: Tensor | None = None,
    power: float = 1.0,
) -> None:
    """gradient = (scale exp(z − m) + hard_scale exp(power (z − m))) dz/dx (`top_k/formula.TailFunctions`)."""
    for rows in row_blocks(logits.student):
        z = _capped_entries(logits.student[rows], logits.student_cap)
        e = _exponentials(z, m[rows]).mul_(scale[rows, None])
        if hard_scale is not None:
            e.addcmul_(_exponentials(z, m[rows], power), hard_scale[rows, None])
        undo_cap(e, z.masked_fill(z == -torch.inf, 0.0), logits.student_cap)
        gradient[rows] = e


def _capped_entries(x: Tensor, cap: float | None) -> Tensor:
    """z for the entries that are not −inf, which stay."""
    return x if cap is None else torch.tanh(x).mul_(cap).masked_fill_(x == -torch.inf, -torch.inf)


def _exponentials(z: Tensor, m: Tensor, power: float = 1.0) -> Tensor:
    """exp(power (z − m)), 0 throughout a row without entries."""
    a = torch.sub(z, m.clamp(min=torch.finfo(z.dtype).min)[:, None])
    return (a if power == 1.0 else a.mul_(power)).exp_()


def apply_cap(x: Tensor, cap: float | None, keep: bool) -> Tensor | None:
    """x becomes z = cap · tanh(x); a copy of z is returned if the gradient will want it back."""
    if cap is None:
        return None
    x.tanh_().mul_(cap)
    return x.clone() if keep else None


def undo_cap(gradient: Tensor, z: Tensor | None, cap: float | None) -> None:
    """Gradient by z becomes gradient by x: dz/dx = cap − z² / cap."""
    if cap is not None and z is not None:
        gradient.mul_(z.square_().div_(-cap).add_(cap))


def hand_over(block: Tensor, gradient: Tensor) -> None:
    """The block is the gradient now; a copy where it is wanted apart."""
    if gradient.data_ptr() != block.data_ptr():
        gradient.copy_(block)
