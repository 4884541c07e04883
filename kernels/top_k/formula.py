"""KL divergences against a teacher that is known by its k likeliest tokens alone.

S holds the listed ids, q their probabilities; what is not listed is the tail, of mass p_tail = Σ_{v∉S} p_v in the student
and q_tail = 1 − Σ_S q in the teacher; ρ = log(p_tail / q_tail). With Q = Σ_S q, P = Σ_S p, p̃ = p / P, q̃ = q / Q, and e the
student's distribution within the tail (so that p_v = p_tail e_v there):

| direction-tail      | value D                                 | gradient on S                       | factor of e     |
|---------------------|-----------------------------------------|-------------------------------------|-----------------|
| reverse-bucket      | Σ_S p log(p/q) + p_tail ρ               | p (log(p/q) − D)                    | p_tail (ρ − D)  |
| forward-bucket      | Σ_S q log(q/p) − q_tail ρ               | p − q                               | p_tail − q_tail |
| reverse-renormalise | KL(p̃ ‖ q̃) − log P                       | p̃ (log(p̃/q̃) − KL(p̃ ‖ q̃)) + p − p̃   | p_tail          |
| forward-renormalise | KL(q̃ ‖ p̃) − log P = Σ_S q̃ log(q̃/p)     | p − q̃                               | p_tail          |
| reverse-drop        | Σ_S p log(p/q)                          | p (log(p/q) + 1 − D − P)            | −p_tail (D + P) |
| forward-drop        | Σ_S q log(q/p)                          | Q p − q                             | Q p_tail        |

A tail as a bucket makes D the divergence of two distributions over k + 1 outcomes: at least 0, at most the true one.
Renormalised, −log P is what leaving the set costs. Dropped, D is no divergence: it may be negative, and in the reverse
direction a student that leaves the set pays nothing.

What a sampled token adds to reverse-bucket is in `sampled.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastkl.kernels.divergence.formula import HardTarget
from fastkl.kernels.options import SampledTail
from fastkl.kernels.rows.interface import Logits, TailTokens
from fastkl.kernels.rows.parallel.vocabulary import Vocabulary
from fastkl.kernels.top_k.sampled import TailPerToken, addition


class TailFunctions(Protocol):
    """What is dense, and so a matter of the backend. Entries of −inf are left out, under a soft-cap too."""

    def tail_sums(self, logits: Logits, out: Tensor, power: float | None = None) -> None:
        """out[0] = m = max z [n], out[1] = Σ exp(z − m) of the student; −inf and 0 for no entries.

        With a power, out[2] = Σ exp(power (z − m)).
        """

    def tail_gradient(
        self,
        logits: Logits,
        m: Tensor,
        scale: Tensor,
        gradient: Tensor,
        hard_scale: Tensor | None = None,
        power: float = 1.0,
    ) -> None:
        """gradient = (scale exp(z − m) + hard_scale exp(power (z − m))) dz/dx, [n, V]; m and scales [n]."""


def top_k(
    variant: str,
    dense: TailFunctions,
    logits: Logits,
    tokens: Tensor | None,
    out: Tensor,
    gradient: Tensor | None,
    hard: HardTarget | None = None,
    tail: SampledTail | None = None,
) -> None:
    """out[0] = D of `variant`, with its gradient; out[1] = −log p[y], 0 without tokens.

    With a sampled tail, of reverse-bucket, tokens and `logits.tail`, out[0] has what they add, and out[2:6] is a
    `TailPerToken`. With a hard target, which needs tokens, out[-1] is its −log p¹[y], and the gradient is that of all
    together.

    Ids below 0 pad a list at its end. A list without an id, or with one outside the vocabulary, makes its row NaN, and such
    a token its log-prob.
    """
    assert logits.top_ids is not None
    assert logits.top_logprobs is not None
    x, vocabulary, padding = logits.student, logits.vocabulary, logits.top_ids < 0
    wrong = padding[:, 0] | (logits.top_ids >= vocabulary.size(x)).any(1)
    ids = torch.where(padding, logits.top_ids[:, :1], logits.top_ids).masked_fill(wrong[:, None], 0)
    scores, token_scores = _scores(logits, ids, tokens)
    z, slope = _capped(scores, logits.student_cap)
    token = None if tokens is None else _token(logits, tokens, token_scores, (ids == tokens[:, None]) & ~padding)
    vocabulary.put(x, ids, torch.full_like(scores, -torch.inf))
    sums = out.new_empty(2 if hard is None else 3, out.shape[1])
    dense.tail_sums(logits, sums, None if hard is None else hard.power)
    sums = vocabulary.tail(sums, 1.0 if hard is None else hard.power)
    z = z.masked_fill(padding, -torch.inf)
    peak = torch.maximum(sums[0], z.amax(1))  # taken off first: large logits cancel before anything is rounded
    z, log_tail = z - peak[:, None], sums[0] - peak + sums[1].log()
    lse = torch.logaddexp(log_tail, torch.logsumexp(z, 1))
    log_q = logits.top_logprobs.masked_fill(padding, -torch.inf)
    listed = _Listed(z - lse[:, None], log_q, log_tail - lse, 1.0 - log_q.exp().sum(1))
    terms = _TERMS[variant](listed)
    out[0] = terms.value.masked_fill(wrong, torch.nan)
    out[1] = 0.0 if token is None else (peak - token.z) + lse
    if tail is not None and token is not None:
        terms = _sampled(tail, logits.tail, listed, terms, token, out)
    # The hard target: log p¹ = power (z − peak) − hard_lse on S and in the tail.
    if hard is not None and token is not None:
        log_tail = hard.power * (sums[0] - peak) + sums[2].log()
        hard_lse = torch.logaddexp(log_tail, torch.logsumexp(hard.power * z, 1))
        out[-1] = hard.power * (peak - token.z) + hard_lse
    if gradient is None:
        return
    u, share, hard_scale, power = terms.gradient, _share(terms.tail, sums[1], wrong), None, 1.0
    if token is None or (hard is None and tail is None):
        dense.tail_gradient(logits, sums[0], share, gradient)
        _put_listed(vocabulary, gradient, ids, u * slope, padding, wrong)
        return
    at_token = share * torch.exp(token.z - sums[0]).where(sums[1] > 0, 0.0)  # the gradient there, if it is in the tail
    if terms.token is not None:
        u = u - terms.token[:, None] * listed.log_p.exp()
        share = _share(terms.tail - terms.token * listed.log_p_tail.exp(), sums[1], wrong)
        at_token = at_token - terms.token * torch.expm1(-out[1])  # 1 − p[y], which may be small
    if hard is not None:
        power = hard.power
        factor = torch.full_like(token.z, hard.coef * power).masked_fill(token.z.isnan(), torch.nan)
        hard_scale = factor * torch.exp(power * (sums[0] - peak) - hard_lse)
        p = torch.exp(power * z - hard_lse[:, None])
        u = u + factor[:, None] * (p - token.listed.to(p.dtype))
        at_token = at_token + factor * torch.expm1(-out[-1])
    dense.tail_gradient(logits, sums[0], share, gradient, hard_scale, power)
    # The token as one more entry of the list: again the first one where it is listed, or where there is no such token.
    again = token.listed.any(1) | token.z.isnan()
    u = torch.cat([u * slope, (at_token * token.slope)[:, None]], 1)
    ids = torch.cat([ids, torch.where(again, ids[:, 0], token.id)[:, None]], 1)
    _put_listed(vocabulary, gradient, ids, u, torch.cat([padding, again[:, None]], 1), wrong)


def _share(tail: Tensor, exponentials: Tensor, wrong: Tensor) -> Tensor:
    """The factor of exp(z − m) in the tail that makes the factor of e `tail`; NaN in rows that are wrong."""
    some = exponentials > 0
    return (tail.where(some, 0.0) / exponentials.where(some, 1.0)).masked_fill(wrong, torch.nan)


def _put_listed(
    vocabulary: Vocabulary, gradient: Tensor, ids: Tensor, u: Tensor, padding: Tensor, wrong: Tensor
) -> None:
    """u [n, k] at the ids; padding repeats the first entry, and rows that are wrong become NaN."""
    u = torch.where(padding, u[:, :1], u).masked_fill(wrong[:, None], torch.nan)
    vocabulary.put(gradient, ids, u.to(gradient.dtype))


class _Token(NamedTuple):
    """The sampled token of each row, [n]."""

    id: Tensor
    z: Tensor  # NaN for a token outside the vocabulary, which on a GPU nobody has looked for
    slope: Tensor  # dz/dx
    listed: Tensor  # bool [n, k]: where the list has it


def _token(logits: Logits, tokens: Tensor, scores: Tensor, listed: Tensor) -> _Token:
    wrong = (tokens < 0) | (tokens >= logits.vocabulary.size(logits.student))
    z, slope = _capped(scores, logits.student_cap)
    if logits.student_cap is not None:  # what the tail leaves out
        z = z.masked_fill((scores == -torch.inf) & ~listed.any(1), -torch.inf)
    return _Token(tokens, z.masked_fill(wrong, torch.nan), slope, listed)


class _Listed(NamedTuple):
    """Student and teacher on S [n, k] and in the tail [n], log-probs; −inf where a list is padded."""

    log_p: Tensor
    log_q: Tensor
    log_p_tail: Tensor
    q_tail: Tensor  # a mass: what the rounding of the log-probs leaves of 1 − Σ q


class _Terms(NamedTuple):
    value: Tensor  # [n]
    gradient: Tensor  # [n, k], on S
    tail: Tensor  # [n], the factor of e in the tail
    token: Tensor | None = None  # [n], the factor of 1[y] − p beside both


def _sampled(
    tail: SampledTail, given: TailTokens | None, s: _Listed, bucket: _Terms, token: _Token, out: Tensor
) -> _Terms:
    """reverse-bucket, which is in `out`, and what the sampled tokens add to it (`sampled.py`)."""
    assert given is not None
    p, p_tail, outside = s.log_p.exp(), s.log_p_tail.exp(), ~token.listed.any(1)
    mass = p.sum(1)
    added = addition(tail, given, -out[1], _tail_ratio(s), p_tail, outside)
    out[2], out[3], out[4], out[5] = TailPerToken(outside, mass, out[0], added.gap)
    out[0] += added.value
    by_mass = added.mass_slope * p_tail  # ∇p_tail is −p_tail p on S, and p_tail P e in the tail
    u, factor = bucket.gradient - by_mass[:, None] * p, bucket.tail + by_mass * mass
    return _Terms(out[0], u, factor, added.token_slope)


def _reverse_bucket(s: _Listed) -> _Terms:
    p, p_tail = s.log_p.exp(), s.log_p_tail.exp()
    ratio, tail_ratio = _finite(s.log_p - s.log_q, p), _tail_ratio(s)
    inside = (p * ratio).sum(1)
    value = inside + p_tail * tail_ratio
    # ρ − D, in which ρ cancels where nearly all of the student is in the tail
    return _Terms(value, p * (ratio - value[:, None]), p_tail * (p.sum(1) * tail_ratio - inside))


def _forward_bucket(s: _Listed) -> _Terms:
    q, p_tail = s.log_q.exp(), s.log_p_tail.exp()
    q_tail = s.q_tail.where(s.q_tail > _least(q.dtype), 0.0)
    value = (q * _finite(s.log_q - s.log_p, q)).sum(1)
    value = value + q_tail * _finite(_log_tail(q_tail) - s.log_p_tail, q_tail)
    return _Terms(value, s.log_p.exp() - q, p_tail - q_tail)


def _reverse_renormalised(s: _Listed) -> _Terms:
    log_inside, p = torch.logsumexp(s.log_p, 1), s.log_p.exp()
    log_p, log_q = s.log_p - log_inside[:, None], torch.log_softmax(s.log_q, 1)
    p_inside = log_p.exp()
    ratio = _finite(log_p - log_q, p_inside)
    kl = (p_inside * ratio).sum(1)
    return _Terms(kl - log_inside, p_inside * (ratio - kl[:, None]) + p - p_inside, s.log_p_tail.exp())


def _forward_renormalised(s: _Listed) -> _Terms:
    log_q = torch.log_softmax(s.log_q, 1)
    q = log_q.exp()
    return _Terms((q * _finite(log_q - s.log_p, q)).sum(1), s.log_p.exp() - q, s.log_p_tail.exp())


def _reverse_dropped(s: _Listed) -> _Terms:
    p = s.log_p.exp()
    ratio = _finite(s.log_p - s.log_q, p)
    value = (p * ratio).sum(1)
    mean = value + p.sum(1)
    return _Terms(value, p * (ratio + 1.0 - mean[:, None]), -s.log_p_tail.exp() * mean)


def _forward_dropped(s: _Listed) -> _Terms:
    q = s.log_q.exp()
    inside = q.sum(1)
    value = (q * _finite(s.log_q - s.log_p, q)).sum(1)
    return _Terms(value, inside[:, None] * s.log_p.exp() - q, inside * s.log_p_tail.exp())


_TERMS: dict[str, Callable[[_Listed], _Terms]] = {
    "reverse-bucket": _reverse_bucket,
    "forward-bucket": _forward_bucket,
    "reverse-renormalise": _reverse_renormalised,
    "forward-renormalise": _forward_renormalised,
    "reverse-drop": _reverse_dropped,
    "forward-drop": _forward_dropped,
}


def _finite(log_ratio: Tensor, mass: Tensor) -> Tensor:
    """A log-ratio where its weight is positive, else 0: 0 · log 0 = 0."""
    return log_ratio.where(mass > 0, 0.0)


def _tail_ratio(s: _Listed) -> Tensor:
    """ρ [n], 0 where the student has no tail; a number where the tail's mass underflows too."""
    return (s.log_p_tail - _log_tail(s.q_tail)).where(s.log_p_tail != -torch.inf, 0.0)


def _log_tail(q_tail: Tensor) -> Tensor:
    """The log of the teacher's tail, which to its rounding may be no tail at all."""
    return torch.log(q_tail.clamp(min=_least(q_tail.dtype)))


def _least(dtype: torch.dtype) -> float:
    """The least mass that 1 − Σ q can tell from the rounding of the log-probs."""
    return 16 * torch.finfo(dtype).eps


def _scores(logits: Logits, ids: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """x of the student at the ids [n, k], and at the tokens [n]; anything where those do not exist, or there are none."""
    vocabulary, count = logits.vocabulary, ids.shape[1]
    if tokens is not None:
        wrong = (tokens < 0) | (tokens >= vocabulary.size(logits.student))
        ids = torch.cat([ids, tokens.masked_fill(wrong, 0)[:, None]], 1)
    x = vocabulary.part(logits.student, ids)
    if logits.student_bias is not None:
        x = x + vocabulary.part(logits.student_bias.expand_as(logits.student), ids)
    x = vocabulary.total(x)
    return x[:, :count], x[:, -1]


def _capped(x: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """z and dz/dx."""
    if cap is None:
        return x, torch.ones_like(x)
    z = cap * torch.tanh(x)
    return z, cap - z.square() / cap
