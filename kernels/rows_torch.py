"""Row functions (`rows.py`) in plain PyTorch, for every device.

They work in place, a block of rows at a time, so that what they need beside the chunk (a copy under a soft-cap, a mask, a
product) stays small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkl.kernels.rows import Logits

# Smaller blocks that fit a cache are no faster (a row is most of one already), and every pass over a block is a barrier
# between threads, which costs dearly on a busy machine.
BLOCK_BYTES = 32 * 2**20


def token_nll(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = lse(z) − z[y]; gradient p − 1[y]."""
    assert tokens is not None
    for rows in _row_blocks(logits.student):
        block, y = logits.student[rows], tokens[rows, None]
        z = _apply_cap(block, logits.student_cap, keep=gradient is not None)
        target = block.gather(1, y).squeeze(1)
        peak, top = _softmax_in_place(block)
        out[0, rows] = (peak - target) - top  # in this order: large logits cancel before anything is rounded
        if gradient is not None:
            block.scatter_add_(1, y, block.new_full((1, 1), -1.0).expand_as(y))
            _undo_cap(block, z, logits.student_cap)
            _hand_over(block, gradient[rows])


def reverse_kl(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
    """out[0] = Σ p (log p − log q), gradient p (log p − log q − out[0]); out[1] = −log p[y], 0 without tokens.

    A token that the student cannot emit (p = 0) adds nothing, whatever the teacher says of it; one that the student can
    emit and the teacher cannot (q = 0) makes the divergence infinite.
    """
    assert logits.teacher is not None
    for rows in _row_blocks(logits.student):
        p, q = logits.student[rows], logits.teacher[rows]
        z = _apply_cap(p, logits.student_cap, keep=gradient is not None)
        _apply_cap(q, logits.teacher_cap, keep=False)
        torch.log_softmax(p, -1, out=p)
        torch.log_softmax(q, -1, out=q)
        if tokens is None:
            out[1, rows] = 0.0
        else:
            out[1, rows] = -p.gather(1, tokens[rows, None]).squeeze(1)
        log_ratio = torch.sub(p, q, out=q)
        p.exp_()
        log_ratio.masked_fill_(p == 0, 0.0)
        kl = torch.linalg.vecdot(p, log_ratio)
        out[0, rows] = kl
        if gradient is not None:
            p.mul_(log_ratio.sub_(kl[:, None]))
            _undo_cap(p, z, logits.student_cap)
            _hand_over(p, gradient[rows])


def _row_blocks(chunk: Tensor) -> Iterator[slice]:
    """Blocks of about BLOCK_BYTES on a CPU; the whole chunk elsewhere, where launches cost more than cache misses."""
    n, vocabulary = chunk.shape
    step = max(1, BLOCK_BYTES // (vocabulary * chunk.element_size())) if chunk.is_cpu else max(1, n)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _softmax_in_place(z: Tensor) -> tuple[Tensor, Tensor]:
    """z becomes softmax(z). Returns max z and log max p, [n] each; lse(z) is their difference, well conditioned."""
    peak = z.amax(-1)
    torch.softmax(z, -1, out=z)
    return peak, z.amax(-1).log_()


def _apply_cap(x: Tensor, cap: float | None, keep: bool) -> Tensor | None:
    """x becomes z = cap · tanh(x); a copy of z is returned if the gradient will want it back."""
    if cap is None:
        return None
    x.tanh_().mul_(cap)
    return x.clone() if keep else None


def _undo_cap(gradient: Tensor, z: Tensor | None, cap: float | None) -> None:
    """Gradient by z becomes gradient by x: dz/dx = cap − z² / cap."""
    if cap is not None and z is not None:
        gradient.mul_(z.square_().div_(-cap).add_(cap))


def _hand_over(block: Tensor, gradient: Tensor) -> None:
    """The block is the gradient now; a copy where it is wanted apart."""
    if gradient.data_ptr() != block.data_ptr():
        gradient.copy_(block)
