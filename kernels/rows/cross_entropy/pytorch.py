"""The cross-entropy of a row with its target, smoothed and regularised, in plain PyTorch: in place, as `rows/pytorch.py`.

With c the class weights (1 without any), C = Σ c, ε the label smoothing and ζ the z-loss,

    out[0] = (1 − ε) c[y] (−log p[y]) + ε/V Σ c (−log p) + ζ lse²          0 · ∞ = 0
    u      = a p − b 1[y] − ε/V c                                          b = (1 − ε) c[y], a = b + ε/V C + 2 ζ lse

    out[1] = −log p[y]     out[2] = lse     out[3] = max z − z[y]     out[4], if there is one: the first likeliest id
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.pytorch import apply_cap, hand_over, undo_cap


def cross_entropy(
    options: CrossEntropy, logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None
) -> None:
    assert tokens is not None
    vocabulary = logits.vocabulary
    count, c = vocabulary.size(logits.student), logits.class_weight
    own, share = None if c is None else vocabulary.own(c, logits.student), options.label_smoothing / count
    for rows in vocabulary.blocks(logits.student):
        block, y, smoothed = logits.student[rows], tokens[rows, None], None
        z = apply_cap(block, logits.student_cap, keep=gradient is not None)
        if len(out) > 4:
            out[4, rows] = vocabulary.first_largest(block)[0].to(out.dtype)
        if share == 0.0:
            peak, top, target = vocabulary.softmax(block, y)
        else:
            peak, top, target = vocabulary.log_softmax(block, y)
            smoothed = vocabulary.total(-_weighted_sum(block, own))
            block.exp_()
        nll, lse = (peak - target) - top, peak - top
        b = torch.full_like(nll, 1.0 - options.label_smoothing)
        if c is not None:
            b = b * c[tokens[rows]]
        value, a = (b * nll).where(b != 0, 0.0), b
        if smoothed is not None:
            value, a = value + share * smoothed, a + share * (count if c is None else c.sum())
        if options.z_loss != 0.0:
            value, a = value + options.z_loss * lse.square(), a + 2.0 * options.z_loss * lse
        out[0, rows], out[1, rows], out[2, rows], out[3, rows] = value, nll, lse, peak - target
        if gradient is not None:
            if c is not None or options != CrossEntropy():
                block.mul_(a[:, None])
            if share != 0.0:
                block.sub_(share if own is None else share * own)
            vocabulary.subtract(block, y, b[:, None])
            undo_cap(block, z, logits.student_cap)
            hand_over(block, gradient[rows])


def from_scores(
    options: CrossEntropy, scores: Tensor, tokens: Tensor, class_weight: Tensor | None, out: Tensor
) -> None:
    """`out` [4, n] without a label smoothing, from the values of `token_nll_entropy`."""
    nll, _, m, above, gap = scores
    b = torch.ones_like(nll) if class_weight is None else class_weight[tokens]
    out[1], out[2], out[3] = nll, m + above, gap
    out[0] = (b * nll).where(b != 0, 0.0)
    if options.z_loss != 0.0:
        out[0] += options.z_loss * out[2].square()


def _weighted_sum(log_p: Tensor, c: Tensor | None) -> Tensor:
    """Σ c log p with 0 · ∞ = 0."""
    if c is None:
        return log_p.sum(-1)
    total = log_p @ c
    if total.is_cpu and not total.isnan().any():
        return total
    return (log_p * c).masked_fill_((c == 0) & ~log_p.isnan(), 0.0).sum(-1)
