"""Estimators of a gradient at one position, with respect to the student's logits, for a token y that the student sampled.

p and q are student and teacher, d = log p − log q, KL = Σ p d. K is a list of tokens, P and Q are the masses on it, and
ρ = log((1 − P) / (1 − Q)). Every estimator is

    fixed + weight[y] (1[y] − p)                  1[y] − p is the gradient of log p[y]

and ∇[c] = p (c − Σ p c) is the gradient of Σ p c for constants c:

| estimator    | fixed                              | weight                | its mean is the gradient of  |
|--------------|------------------------------------|-----------------------|------------------------------|
| exact        | ∇[d]                               | 0                     | the reverse KL               |
| sampled      | 0                                  | d − baseline          | the reverse KL               |
| clipped      | 0                                  | d, within ±bound      | no divergence                |
| power        | 0                                  | (p^α − q^α) / α       | the density-power divergence |
| bucket       | ∇[d on K, ρ elsewhere]             | 0                     | reverse-bucket               |
| renormalise  | p − p̃ + p̃ (log(p̃/q̃) − KL(p̃ ‖ q̃))  | 0                     | reverse-renormalise          |
| drop         | ∇[d + 1 on K, 0 elsewhere]         | 0                     | reverse-drop                 |
| sampled tail | bucket + s ∇[−c on K, 0 elsewhere] | s (d − ρ − c), 0 on K | the reverse KL if s = 1      |

p̃ and q̃ are p/P and q/Q on K and 0 elsewhere, s is the tail's weight. `fastkl.kernels.top_k.formula` has
the divergences on a list. The density-power divergence (Basu et al., 1998) is
Σ [p^(1+α)/(1+α) − p q^α + α/(1+α) q^(1+α)] / α.

Why the sampled tail is unbiased: the mean of its second term is s ∇[0 on K, d − ρ − c elsewhere]. ∇ is linear, and 0 of a
constant. So its mean is ∇[d on K, ρ elsewhere] + s ∇[−c on K, d − ρ − c elsewhere] = (1 − s) bucket + s exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Student and teacher at n positions."""

    p: Tensor  # [n, V]
    q: Tensor  # [n, V]
    d: Tensor  # [n, V], log p − log q, finite


class Estimator(NamedTuple):
    fixed: Tensor | None  # [n, V]; None: 0
    weight: Tensor | None = None  # [n, V]; None: 0


def rows_of(log_p: Tensor, log_q: Tensor) -> Rows:
    return Rows(log_p.exp(), log_q.exp(), log_p - log_q)


def exact(rows: Rows) -> Estimator:
    return Estimator(_gradient_of_mean(rows.p, rows.d))


def sampled(rows: Rows, baseline: Tensor | float = 0.0) -> Estimator:
    """`baseline` is a number, or one for each row [n, 1]."""
    return Estimator(None, rows.d - baseline)


def clipped(rows: Rows, bound: float) -> Estimator:
    return Estimator(None, rows.d.clamp(-bound, bound))


def power(rows: Rows, alpha: float) -> Estimator:
    return Estimator(None, (rows.p**alpha - rows.q**alpha) / alpha)


def bucket(rows: Rows, listed: Tensor) -> Estimator:
    """`listed` [n, V] says what is on the list, here and below."""
    return Estimator(_gradient_of_mean(rows.p, rows.d.where(listed, tail_ratio(rows, listed))))


def renormalise(rows: Rows, listed: Tensor) -> Estimator:
    p, q = (x.where(listed, 0.0).sum(1, keepdim=True) for x in rows[:2])
    inside = rows.p.where(listed, 0.0) / p
    return Estimator(rows.p - inside + _gradient_of_mean(inside, rows.d - (p / q).log()))


def drop(rows: Rows, listed: Tensor) -> Estimator:
    return Estimator(_gradient_of_mean(rows.p, (rows.d + 1.0).where(listed, 0.0)))


def sampled_tail(rows: Rows, listed: Tensor, baseline: Tensor | float = 0.0, weight: float = 1.0) -> Estimator:
    """`baseline` is c: a number, or one for each row [n, 1]."""
    constant = (torch.zeros_like(rows.d) - baseline).where(listed, 0.0)
    fixed = _gradient_of_mean(rows.p, rows.d.where(listed, tail_ratio(rows, listed)) + weight * constant)
    return Estimator(fixed, weight * off_list(rows, listed, tail_ratio(rows, listed) + baseline))


def off_list(rows: Rows, listed: Tensor, baseline: Tensor) -> Tensor:
    """The weight of a sampled tail, with ρ + c [n, 1] as the baseline; [n, V]."""
    return (rows.d - baseline).masked_fill(listed, 0.0)


def tail_ratio(rows: Rows, listed: Tensor) -> Tensor:
    """ρ [n, 1]. The masses off the list are summed, not subtracted from 1: nothing cancels."""
    least = torch.finfo(rows.p.dtype).tiny
    p, q = (x.masked_fill(listed, 0.0).sum(1, keepdim=True).clamp(min=least) for x in rows[:2])
    return p.log() - q.log()


def mean(p: Tensor, estimator: Estimator) -> Tensor:
    """The estimator's mean over y ~ p, [n, V]."""
    fixed, weight = estimator
    parts = [part for part in (fixed, None if weight is None else _gradient_of_mean(p, weight)) if part is not None]
    return sum(parts[1:], parts[0])


def variance(p: Tensor, weight: Tensor) -> Tensor:
    """The trace of the covariance over y ~ p of an estimator with this weight, [n].

    ‖1[y] − p‖² is 1 − 2 p[y] + ‖p‖², and the mean of weight[y] (1[y] − p) is ∇[weight].
    """
    square = p.square().sum(1, keepdim=True).add(1.0).sub(p, alpha=2.0)
    second = (p * square).mul_(weight.square()).sum(1)
    return second - _gradient_of_mean(p, weight).square_().sum(1)


def _gradient_of_mean(p: Tensor, constants: Tensor) -> Tensor:
    products = p * constants
    return products.addcmul_(p, products.sum(1, keepdim=True), value=-1.0)
