"""Every estimator on the rows of one pair.

Keys of the report's `rows`, one for each estimator:

    estimator, of, k        its name, whose likeliest tokens K are (teacher, student, both) and how many of each
    baseline                none; mean: of d over the batch; kl: the row's exact KL; ρ; ρ + c: c is the mean of d − ρ over
                            earlier tokens off the list
    parameter               the weight of a sampled tail, the power, the bound
    bias                    sqrt(Σ ‖bias_i‖² / Σ ‖g_i‖²), by logits, over the rows i
    variance                Σ tr cov(ĝ_i) / Σ ‖g_i‖², one sample of each row
    head_bias, cosine       ‖M̂ − M‖ / ‖M‖, and the cosine of both; M is the head's gradient of the whole batch
    head_variance           the noise² of the whole batch, relative to ‖M‖²
    limit_bias              head_bias of a batch without end
    limit_noise             noise² of a batch of n tokens is limit_noise / n, relative to the gradient of one without end
    tokens                  n at which the bucket on the same list errs as much (without a list: on the teacher's 20, or the
                            k of `usual_k`). With more tokens this estimator is the better one

`limit_…` and `tokens` are null where the batch is too small to tell a gradient from its scatter. g is the gradient of the
reverse KL; a power's is that of its own divergence, but `cosine` is to the reverse KL's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.estimators import formulas
from bench.estimators.formulas import Estimator, Rows
from bench.estimators.rollouts import Samples
from bench.estimators.statistics import (
    NO_ERROR,
    NO_NOISE,
    Error,
    Gradient,
    Noise,
    earlier_mean,
    equal_tokens,
    head_gradient,
    inner,
    ratios,
)

LISTS = ("teacher", "student", "both")
TAIL_WEIGHTS = (1.0, 0.5)
POWERS = (1.0, 0.5)
BOUNDS = (5.0, 1.0)
USUAL_K = 20

Row = dict[str, Any]


class Part(NamedTuple):
    """A completion of n tokens."""

    rows: Rows
    exact: Tensor  # [n, V], the gradient of the reverse KL
    hidden: Tensor  # [n, D]
    tokens: Tensor  # [n]
    likeliest: dict[str, Tensor]  # the ids [n, k] of teacher and student
    span: slice  # of all N tokens

    def listed(self, of: str, k: int) -> Tensor:
        """[n, V]: what is on the list."""
        listed = torch.zeros_like(self.exact, dtype=torch.bool)
        for name, ids in self.likeliest.items():
            if of in (name, "both"):
                listed.scatter_(1, ids[:, :k], True)
        return listed


class Tail(NamedTuple):
    """What is off a list, at N tokens."""

    ratio: Tensor  # [N, 1], ρ
    mass: Tensor  # [N], the student's
    kl: Tensor  # [N], the bucket's
    sampled: Tensor  # [N] bool: the token is off the list


class Study:
    """The samples of a pair, and what each estimator makes of them."""

    def __init__(self, samples: Samples, ks: Sequence[int]) -> None:
        self._parts = [_part(samples, span, max(ks)) for span in samples.spans()]
        self._kl = torch.cat([(part.rows.p * part.rows.d).sum(1, keepdim=True) for part in self._parts])
        self._d = torch.cat([part.rows.d.gather(1, part.tokens[:, None]) for part in self._parts])
        self._squares = torch.cat([part.hidden.square().sum(1) for part in self._parts])
        self._exact, self._gradient = self._head(lambda part: part.exact)
        lists = list(itertools.product(LISTS, sorted(ks)))
        self._tails = {(of, k): self._tail(of, k) for of, k in lists}
        self._buckets = {(of, k): self._list_error(formulas.bucket, of, k) for of, k in lists}

    def conditions(self) -> Row:
        """What the rows are like."""
        return {
            "tokens": len(self._d),
            "completions": len(self._parts),
            "vocabulary": self._parts[0].exact.shape[1],
            "kl": float(self._kl.mean()),
            "student_entropy": self._mean_entropy(lambda rows: rows.p),
            "teacher_entropy": self._mean_entropy(lambda rows: rows.q),
        }

    def lists(self) -> Iterator[Row]:
        """Of each list: the student's mass off it, the share of the KL that its bucket sees, and d and ρ off it."""
        for (of, k), tail in self._tails.items():
            yield {
                "of": of,
                "k": k,
                "mass_off": float(tail.mass.mean()),
                "tokens_off": float(tail.sampled.float().mean()),
                "kl_share": float(tail.kl.sum() / self._kl.sum()),
                "d_off": float(self._d[tail.sampled].mean()) if bool(tail.sampled.any()) else None,
                "ratio_off": float(tail.ratio[tail.sampled].mean()) if bool(tail.sampled.any()) else None,
            }

    def estimators(self) -> Iterator[Row]:
        """A row of the report for each."""
        ks = [k for of, k in self._buckets if of == "teacher"]
        yield from self._without_list(self._buckets["teacher", usual_k(ks)])
        for of, k in self._buckets:
            yield from self._with_list(of, k)
        for k, formula in itertools.product(ks, (formulas.renormalise, formulas.drop)):
            error = self._list_error(formula, "teacher", k)
            yield self._row(_label(formula.__name__, "teacher", k), error, NO_NOISE, self._buckets["teacher", k])

    def _without_list(self, bucket: Error) -> Iterator[Row]:
        baselines = {"none": torch.zeros_like(self._kl), "mean": self._d.mean().expand_as(self._kl), "kl": self._kl}
        for name, values in baselines.items():
            noise = self._noise(partial(_weight, partial(_sampled, values)))
            yield self._row(_label("sampled", baseline=name), NO_ERROR, noise, bucket)
        for bound in BOUNDS:
            build = partial(_of_rows, partial(formulas.clipped, bound=bound))
            noise = self._noise(partial(_weight, build))
            yield self._row(_label("clipped", parameter=bound), self._error(build), noise, bucket)
        for alpha in POWERS:
            yield self._power(alpha)

    def _power(self, alpha: float) -> Row:
        """Compared with the gradient of its own divergence, which is its mean."""
        build = partial(_of_rows, partial(formulas.power, alpha=alpha))
        mean, gradient = self._head(lambda part: formulas.mean(part.rows.p, build(part)))
        own = ratios(gradient, NO_ERROR, self._noise(partial(_weight, build)), len(self._d))
        lengths = gradient.head.square * self._gradient.head.square
        return {
            **_label("power", parameter=alpha),
            **own,
            "cosine": inner(mean, self._exact) / lengths**0.5,
            "tokens": None,
        }

    def _with_list(self, of: str, k: int) -> Iterator[Row]:
        bucket, tail = self._buckets[of, k], self._tails[of, k]
        yield self._row(_label("bucket", of, k), bucket, NO_NOISE, bucket)
        running = earlier_mean((self._d - tail.ratio).squeeze(1), tail.sampled)
        for name, baseline in {"ρ": tail.ratio, "ρ + c": tail.ratio + running}.items():
            noise = self._noise(partial(_off_list, of, k, baseline))
            for weight in TAIL_WEIGHTS:  # the mean is (1 − weight) bucket + weight exact
                label = _label("sampled tail", of, k, name, weight)
                yield self._row(label, bucket.scaled(1.0 - weight), noise.scaled(weight), bucket)

    def _row(self, label: Row, error: Error, noise: Noise, bucket: Error) -> Row:
        own = ratios(self._gradient, error, noise, len(self._d))
        other = ratios(self._gradient, bucket, NO_NOISE, len(self._d))
        return {**label, **own, "tokens": equal_tokens(own, other)}

    def _list_error(self, formula: Callable[[Rows, Tensor], Estimator], of: str, k: int) -> Error:
        return self._error(lambda part: formula(part.rows, part.listed(of, k)))

    def _error(self, build: Callable[[Part], Estimator]) -> Error:
        total, (squares, length) = self._head(lambda part: formulas.mean(part.rows.p, build(part)) - part.exact)
        return Error(squares, length, inner(total, self._exact))

    def _head(self, gradient: Callable[[Part], Tensor]) -> tuple[Tensor, Gradient]:
        """The gradient of the head [V, D] that gradients by the logits [n, V] make, and the lengths of both."""
        squares = 0.0

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal squares
            for part in self._parts:
                by_logits = gradient(part)
                squares += inner(by_logits, by_logits)
                yield by_logits, part.hidden

        total, length = head_gradient(parts())
        return total, Gradient(squares, length)

    def _noise(self, weight: Callable[[Part], Tensor]) -> Noise:
        variances = torch.cat([formulas.variance(part.rows.p, weight(part)) for part in self._parts])
        return Noise(float(variances.sum()), inner(variances, self._squares))

    def _tail(self, of: str, k: int) -> Tail:
        parts = []
        for part in self._parts:
            (p, _, d), listed = part.rows, part.listed(of, k)
            ratio = formulas.tail_ratio(part.rows, listed)
            sampled = ~listed.gather(1, part.tokens[:, None]).squeeze(1)
            parts.append((ratio, p.masked_fill(listed, 0.0).sum(1), (p * d.where(listed, ratio)).sum(1), sampled))
        return Tail(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _mean_entropy(self, of: Callable[[Rows], Tensor]) -> float:
        return sum(float(torch.special.entr(of(part.rows)).sum()) for part in self._parts) / len(self._d)


def usual_k(ks: Iterable[int]) -> int:
    """The lists that estimators without one are compared with, and that are drawn: of 20, or nearly so many."""
    listed = sorted(ks)
    return max((k for k in listed if k <= USUAL_K), default=listed[0])


def _part(samples: Samples, span: slice, k: int) -> Part:
    log_p, log_q = samples.log_p[span], samples.log_q[span]
    rows = formulas.rows_of(log_p, log_q)
    exact = formulas.mean(rows.p, formulas.exact(rows))
    likeliest = {"teacher": log_q.topk(k).indices, "student": log_p.topk(k).indices}
    return Part(rows, exact, samples.hidden[span], samples.tokens[span], likeliest, span)


def _of_rows(formula: Callable[[Rows], Estimator], part: Part) -> Estimator:
    return formula(part.rows)


def _weight(build: Callable[[Part], Estimator], part: Part) -> Tensor:
    weight = build(part).weight
    assert weight is not None
    return weight


def _sampled(baseline: Tensor, part: Part) -> Estimator:
    return formulas.sampled(part.rows, baseline[part.span])


def _off_list(of: str, k: int, baseline: Tensor, part: Part) -> Tensor:
    return formulas.off_list(part.rows, part.listed(of, k), baseline[part.span])


def _label(
    estimator: str, of: str | None = None, k: int | None = None, baseline: str = "none", parameter: float | None = None
) -> Row:
    return {"estimator": estimator, "of": of, "k": k, "baseline": baseline, "parameter": parameter}
