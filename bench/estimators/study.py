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
                            largest smaller k). With more tokens this estimator is the better one

`limit_…` and `tokens` are null where the batch is too small to tell a gradient from its scatter. g is the gradient of the
reverse KL; a power's is that of its own divergence, but `cosine` is to the reverse KL's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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

Build = Callable[[Rows, slice], Estimator]  # of the rows in that part of all
Row = dict[str, Any]


class Tail(NamedTuple):
    """What is off a list, at N rows."""

    ratio: Tensor  # [N], ρ
    mass: Tensor  # [N], the student's
    kl: Tensor  # [N], the bucket's
    sampled: Tensor  # [N] bool: the token is off the list


class Study:
    """The samples of a pair, and what each estimator makes of them."""

    def __init__(self, samples: Samples, ks: Sequence[int]) -> None:
        self._samples = samples
        self._ids = {"teacher": _likeliest(samples.log_q, max(ks)), "student": _likeliest(samples.log_p, max(ks))}
        self._kl = torch.cat([(rows.p * rows.d).sum(1, keepdim=True) for rows, _ in self._rows()])
        self._d = _at(samples.log_p, samples.tokens) - _at(samples.log_q, samples.tokens)
        self._exact, self._gradient = self._head(lambda rows, _: formulas.exact(rows).fixed)
        lists = list(itertools.product(LISTS, sorted(ks)))
        self._tails = {(of, k): self._tail(of, k) for of, k in lists}
        self._buckets = {(of, k): self._bucket(of, k) for of, k in lists}

    def conditions(self) -> Row:
        """What the rows are like."""
        log_p, log_q = self._samples.log_p, self._samples.log_q
        return {
            "tokens": len(log_p),
            "completions": len(self._samples.lengths),
            "vocabulary": log_p.shape[1],
            "kl": float(self._kl.mean()),
            "student_entropy": _mean_entropy(log_p),
            "teacher_entropy": _mean_entropy(log_q),
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
        usual = max((k for k in ks if k <= USUAL_K), default=ks[0])
        yield from self._without_list(self._buckets["teacher", usual])
        for of, k in self._buckets:
            yield from self._with_list(of, k)
        for k, formula in itertools.product(ks, (formulas.renormalise, formulas.drop)):
            error = self._error(lambda rows, part, k=k, f=formula: f(rows, self._listed("teacher", k, part)))
            yield self._row(_label(formula.__name__, "teacher", k), error, NO_NOISE, self._buckets["teacher", k])

    def _without_list(self, bucket: Error) -> Iterator[Row]:
        baselines = {"none": torch.zeros_like(self._kl), "mean": self._d.mean().expand_as(self._kl), "kl": self._kl}
        for name, values in baselines.items():
            noise = self._noise(lambda rows, part, values=values: formulas.sampled(rows, values[part]))
            yield self._row(_label("sampled", baseline=name), NO_ERROR, noise, bucket)
        for bound in BOUNDS:
            build: Build = lambda rows, _, bound=bound: formulas.clipped(rows, bound)  # noqa: E731
            yield self._row(_label("clipped", parameter=bound), self._error(build), self._noise(build), bucket)
        for alpha in POWERS:
            yield self._power(alpha)

    def _power(self, alpha: float) -> Row:
        """Compared with the gradient of its own divergence, which is its mean."""

        def build(rows: Rows, _: slice) -> Estimator:
            return formulas.power(rows, alpha)

        mean, gradient = self._head(lambda rows, part: formulas.mean(rows.p, build(rows, part)))
        own = ratios(gradient, NO_ERROR, self._noise(build), len(self._d))
        lengths = gradient.head.square * self._gradient.head.square
        cosine = inner(mean, self._exact) / lengths**0.5
        return {**_label("power", parameter=alpha), **own, "cosine": cosine, "tokens": None}

    def _with_list(self, of: str, k: int) -> Iterator[Row]:
        bucket, tail = self._buckets[of, k], self._tails[of, k]
        yield self._row(_label("bucket", of, k), bucket, NO_NOISE, bucket)
        running = earlier_mean(self._d - tail.ratio, tail.sampled)
        for name, values in {"ρ": torch.zeros_like(running), "ρ + c": running}.items():
            noise = self._noise(
                lambda rows, part, c=values: formulas.sampled_tail(rows, self._listed(of, k, part), c[part])
            )
            for weight in TAIL_WEIGHTS:  # the mean is (1 − weight) bucket + weight exact
                label = _label("sampled tail", of, k, name, weight)
                yield self._row(label, bucket.scaled(1.0 - weight), noise.scaled(weight), bucket)

    def _row(self, label: Row, error: Error, noise: Noise, bucket: Error) -> Row:
        own = ratios(self._gradient, error, noise, len(self._d))
        other = ratios(self._gradient, bucket, NO_NOISE, len(self._d))
        return {**label, **own, "tokens": equal_tokens(own, other)}

    def _bucket(self, of: str, k: int) -> Error:
        return self._error(lambda rows, part: formulas.bucket(rows, self._listed(of, k, part)))

    def _error(self, build: Build) -> Error:
        def off(rows: Rows, part: slice) -> Tensor:
            return formulas.mean(rows.p, build(rows, part)) - formulas.exact(rows).fixed

        total, (squares, length) = self._head(off)
        return Error(squares, length, inner(total, self._exact))

    def _head(self, gradient: Callable[[Rows, slice], Tensor]) -> tuple[Tensor, Gradient]:
        """The gradient of the head [V, D] that gradients by the logits [n, V] make, and the lengths of both."""
        squares = 0.0

        def parts() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal squares
            for rows, part in self._rows():
                by_logits = gradient(rows, part)
                squares += inner(by_logits, by_logits)
                yield by_logits, self._samples.hidden[part]

        total, length = head_gradient(parts())
        return total, Gradient(squares, length)

    def _noise(self, build: Build) -> Noise:
        variances = torch.cat([formulas.variance(rows.p, build(rows, part)) for rows, part in self._rows()])
        return Noise(float(variances.sum()), inner(variances, self._samples.hidden.square().sum(1)))

    def _tail(self, of: str, k: int) -> Tail:
        parts = []
        for rows, part in self._rows():
            listed = self._listed(of, k, part)
            ratio = formulas.tail_ratio(rows, listed)
            mass, kl = rows.p.where(~listed, 0.0).sum(1), (rows.p * rows.d.where(listed, ratio)).sum(1)
            sampled = ~listed.gather(1, self._samples.tokens[part][:, None]).squeeze(1)
            parts.append((ratio.squeeze(1), mass, kl, sampled))
        return Tail(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _listed(self, of: str, k: int, part: slice) -> Tensor:
        """[n, V]: what is on the list."""
        listed = torch.zeros_like(self._samples.log_p[part], dtype=torch.bool)
        for name, ids in self._ids.items():
            if of in (name, "both"):
                listed.scatter_(1, ids[part, :k], True)
        return listed

    def _rows(self) -> Iterator[tuple[Rows, slice]]:
        """A completion at a time."""
        for part in self._samples.parts():
            yield formulas.rows_of(self._samples.log_p[part], self._samples.log_q[part]), part


def _label(
    estimator: str, of: str | None = None, k: int | None = None, baseline: str = "none", parameter: float | None = None
) -> Row:
    return {"estimator": estimator, "of": of, "k": k, "baseline": baseline, "parameter": parameter}


def _likeliest(logs: Tensor, k: int) -> Tensor:
    return torch.cat([part.topk(k).indices for part in logs.split(64)])


def _at(logs: Tensor, tokens: Tensor) -> Tensor:
    return logs.gather(1, tokens[:, None]).squeeze(1)


def _mean_entropy(logs: Tensor) -> float:
    return -sum(float((part.exp() * part).sum()) for part in logs.split(64)) / len(logs)
