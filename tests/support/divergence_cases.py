"""What the tests of the divergences share: kinds, rows, rows at the edges, and the rule of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import row_cases
import torch
from loss_cases import assert_as_accurate, generator, largest
from torch import Tensor

from fastkl import reference
from fastkl.kernels.divergence.formula import ROWS, ROWS_WITH_EXTRAS, Divergence, Extras, Outputs
from fastkl.kernels.rows.interface import Logits

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
DivergenceFunction = Callable[[Divergence, float, Logits, Tensor | None, Tensor, Tensor | None], None]


class Kind(NamedTuple):
    name: Divergence
    parameter: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}-{self.parameter}" if self.parameter else self.name

    def of(self, z: Tensor, z_t: Tensor) -> Tensor:
        """The definition, [n]."""
        parameter = (self.parameter,) if self.name in PARAMETRIC else ()
        value: Tensor = getattr(reference, self.name)(z, z_t, *parameter)
        return value


PARAMETRIC = ("jsd", "skewed_forward_kl", "skewed_reverse_kl")
PLAIN = [Kind("reverse_kl"), Kind("forward_kl"), Kind("total_variation")]
KINDS = [*PLAIN, Kind("jsd", 0.5), Kind("skewed_forward_kl", 0.1), Kind("skewed_reverse_kl", 0.1)]
# Where one of the weights of m is small, digits of it are easily lost.
EXTREME = [Kind(name, parameter) for name in PARAMETRIC for parameter in (1e-4, 0.999)]  # type: ignore[arg-type]


class Rows(NamedTuple):
    """A chunk of scaled scores and what belongs to it."""

    x: Tensor  # [n, V]
    x_t: Tensor  # [n, V]
    y: Tensor | None = None  # [n]
    caps: tuple[float | None, float | None] = (None, None)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Rows:
        y = None if self.y is None else self.y.to(device)
        return self._replace(x=self.x.to(device, dtype), x_t=self.x_t.to(device, dtype), y=y)

    def swapped(self) -> Rows:
        return self._replace(x=self.x_t, x_t=self.x, caps=self.caps[::-1])

    def take(self, index: slice | Tensor) -> Rows:
        return self._replace(x=self.x[index], x_t=self.x_t[index], y=None if self.y is None else self.y[index])

    def logits(self) -> tuple[Tensor, Tensor]:
        """z and z_t."""
        pairs = zip((self.x, self.x_t), self.caps, strict=True)
        z, z_t = (x if cap is None else cap * torch.tanh(x) for x, cap in pairs)
        return z, z_t


class Outcome(NamedTuple):
    values: Tensor  # [K, n]
    gradient: Tensor  # [n, V]; without one the chunk as it was left

    def outputs(self) -> tuple[Outputs, Extras]:
        outputs = Outputs.of(self.values)
        assert outputs.extras is not None
        return outputs, outputs.extras


def run(
    function: DivergenceFunction,
    kind: Kind,
    rows: Rows,
    dtype: torch.dtype,
    device: str = "cpu",
    gradient: bool = True,
    apart: torch.dtype | None = None,
    extras: bool = False,
) -> Outcome:
    """A row function on a copy of `rows`, with the gradient in place or in a tensor of dtype `apart`."""
    rows = rows.to(dtype, device)
    x = rows.x.clone()
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((ROWS_WITH_EXTRAS if extras else ROWS, x.shape[0]), torch.nan, dtype=out_dtype, device=device)
    into = None if not gradient else x if apart is None else torch.full_like(x, torch.nan, dtype=apart)
    logits = Logits(x, rows.caps[0], rows.x_t.clone(), rows.caps[1])
    function(*kind, logits, rows.y, out, into)
    return Outcome(out.cpu(), (x if into is None else into).cpu())


def assert_accurate(what: str, ours: Outcome, peer: Outcome, exact: Outcome, rows: Rows, steps: bool) -> None:
    """Values infinite or NaN where float64 has them; elsewhere the rule of the losses, on exactly the same logits.

    `steps`: the gradient jumps where p = q. Rows in which float32 may land on the other side count by their values alone.
    """
    eps = torch.finfo(torch.float32).eps
    z_size = max([1.0, *(c for c in rows.caps if c is not None)])  # a capped logit is rounded after its tanh
    own = torch.finfo(rows.x.dtype).eps if rows.x.dtype == torch.bfloat16 else 0.0
    size = eps * z_size * max(1.0, largest(finite(exact.values)))  # of the values, and of the log-ratios in a gradient
    steep = largest(finite(exact.gradient))  # a wide cap multiplies it
    slacks = (3 * size, size * max(1.0, steep) + own * steep)
    kept = exact.gradient.isfinite().all(-1)
    if steps:
        kept &= ~tied(rows)
    assert not ours.gradient[exact.gradient.isnan().all(-1)].isfinite().any(), what
    for field, slack in zip(Outcome._fields, slacks, strict=True):
        got, other, true = (getattr(o, field) for o in (ours, peer, exact))
        if field == "gradient":
            got, other, true = got[kept], other[kept], true[kept]
        elif (
            z_size > 1.0 and len(got) == ROWS_WITH_EXTRAS
        ):  # which of the saturated logits is the first largest is a matter of rounding
            got, other, true = got[:-1], other[:-1], true[:-1]
        assert torch.equal(got.isnan(), true.isnan()), f"{what} {field}"
        assert torch.equal(got.isinf(), true.isinf()), f"{what} {field}"
        assert_as_accurate(f"{what} {field}", finite(got), finite(other), finite(true), slack)


def tied(rows: Rows) -> Tensor:
    """[n]: is there a token with p and q nearly, but not exactly equal in any precision?"""
    z, z_t = rows.to(torch.float64).logits()
    log_p, log_q = torch.log_softmax(z, -1), torch.log_softmax(z_t, -1)
    near = ((log_p - log_q).abs() < 1e-4 * (1.0 + log_p.abs())) & (log_p > -100.0)
    return near.any(-1) & (rows.x != rows.x_t).any(-1)


def finite(t: Tensor) -> Tensor:
    return t.where(t.isfinite(), 0.0)


def random_rows(n: int, vocabulary: int, spread: float = 2.0, seed: int = 0) -> Rows:
    """Log-ratios of four sizes, none near 0, so that p = q nowhere."""
    g = generator(seed)
    x = torch.randn(n, vocabulary, generator=g) * spread
    shift = torch.tensor([-3.0, -0.7, 0.6, 2.5])[torch.randint(4, (n, vocabulary), generator=g)]
    return Rows(x, x + shift, torch.randint(vocabulary, (n,), generator=g))


def close_rows(n: int, vocabulary: int, distance: float = 1e-2, seed: int = 0) -> Rows:
    g = generator(seed)
    x = torch.randn(n, vocabulary, generator=g) * 2.0
    shift = torch.randn(n, vocabulary, generator=g) * distance
    return Rows(x, x + shift, torch.randint(vocabulary, (n,), generator=g))


def edges(block: int) -> dict[str, Rows]:
    """Rows of two blocks, the second one of 3 columns. Margins of 2000 underflow in float64 too."""
    width = block + 3
    tail = torch.arange(width) >= block
    row, ramp = partial(row_cases.edge, width), partial(row_cases.ramp, width)
    last, steps = width - 1, torch.arange(width) / 16.0
    cases = {
        "one-hot, its token": (row((5, 200.0)), row((5, 180.0)), 5),
        "one-hot, another": (row((5, 200.0)), row((5, 180.0)), 6),
        "one-hot in the last column": (row((last, 200.0)), row((last, 100.0)), last),
        "apart": (row((5, 200.0)), row((6, 200.0)), 5),
        "far apart": (row((5, 2e3)), row((6, 2e3)), 5),
        "flat": (row(), row(), 3),
        "flat, far down": (row(fill=-300.0), row(fill=-200.0), 3),
        "all below -100": (ramp(-150.0), ramp(-120.0).flip(0), last),
        "far up": (ramp(1e4), ramp(-1e4).flip(0), 1),
        "plus and minus 1e4": (1e4 * (1.0 - 2.0 * (torch.arange(width) % 2)), ramp(1e4), 2),
        "two at the top": (row((1, 50.0), (last, 50.0)), row((1, 40.0), (2, 40.0)), 1),
        "forbidden": (row((0, -INF), (last, -INF)), ramp(), 3),
        "the token forbidden": (row((3, -INF)), ramp(), 3),
        "both forbid": (row((3, -INF)), row((3, -INF)), 4),
        "each forbids another": (row((3, -INF)), row((4, -INF)), 5),
        "first block forbidden": (ramp().where(tail, -INF), ramp(2.0), last),
        "both forbid the first block": (ramp().where(tail, -INF), ramp(2.0).where(tail, -INF), last),
        "last block forbidden": (ramp().where(~tail, -INF), ramp(1.0).where(~tail, -INF), 2),
        "no token in common": (ramp().where(tail, -INF), ramp().where(~tail, -INF), 2),
        "forbidden what underflows": (row((0, 2e3)), row((0, 2e3), (3, -INF)), 0),
        "forbidden what underflows later": (row((last, 2e3)), row((last, 9.0), (3, -INF)), last),
        "a forbidden block that underflows": (row((last, 2e3)), ramp().where(tail, -INF), last),
        "both at the lowest number": (ramp().where(tail, LOWEST), ramp(1.0).where(tail, LOWEST), last),
        "raised step by step": (steps, steps / 2.0, last),
        "one rises, one falls": (steps, -steps, 0),
    }
    return {name: Rows(x[None], x_t[None], torch.tensor([y])) for name, (x, x_t, y) in cases.items()}
