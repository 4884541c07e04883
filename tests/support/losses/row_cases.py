"""Rows of scores, how the tests run a row function on them, and the rule of accuracy that row functions are held to."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accuracy import assert_as_accurate, largest
from problem import generator
from torch import Tensor

from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.rows.interface import Logits, RowFunction

INF = math.inf
LOWEST = torch.finfo(torch.float32).min
Caps = tuple[float | None, float | None]
Biases = tuple[Tensor | None, Tensor | None]  # [V]


class Rows(NamedTuple):
    """A chunk of scaled scores of student and teacher, and what belongs to it."""

    x: Tensor  # [n, V]
    x_t: Tensor  # [n, V]
    y: Tensor | None = None  # [n]
    caps: Caps = (None, None)
    biases: Biases = (None, None)  # what is to be added to the scores, by the row function where it is in Triton

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Rows:
        y = None if self.y is None else self.y.to(device)
        b, b_t = (None if b is None else b.to(device, compute_dtype(dtype)) for b in self.biases)
        return self._replace(x=self.x.to(device, dtype), x_t=self.x_t.to(device, dtype), y=y, biases=(b, b_t))

    def added(self) -> Rows:
        """With the biases in the scores."""
        x, x_t = (x if b is None else x + b for x, b in zip((self.x, self.x_t), self.biases, strict=True))
        return self._replace(x=x, x_t=x_t, biases=(None, None))

    def swapped(self) -> Rows:
        return self._replace(x=self.x_t, x_t=self.x, caps=self.caps[::-1], biases=self.biases[::-1])

    def scaled(self, scale: float | Tensor) -> Rows:
        return self._replace(x=self.x * scale, x_t=self.x_t * scale)

    def take(self, index: slice | Tensor) -> Rows:
        return self._replace(x=self.x[index], x_t=self.x_t[index], y=None if self.y is None else self.y[index])

    def logits(self) -> tuple[Tensor, Tensor]:
        """z and z_t."""
        pairs = zip(self.added()[:2], self.caps, strict=True)
        z, z_t = (x if cap is None else cap * torch.tanh(x) for x, cap in pairs)
        return z, z_t


class Outcome(NamedTuple):
    values: Tensor  # [K, n]
    gradient: Tensor  # [n, V]; without one the chunk as it was left


class UnderTest(NamedTuple):
    """A row function, what computes the same in PyTorch, and the definition: (z, z_t, tokens) to the values [K, n]."""

    function: RowFunction
    peer: RowFunction
    definition: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    outputs: int = 1
    device: str = "cpu"
    slack: float = 2.0  # roundings of a value of its own size that are allowed beside the peer's error
    steps: bool = False  # the gradient jumps where p = q

    def run(
        self, rows: Rows, dtype: torch.dtype = torch.float32, gradient: bool = True, apart: torch.dtype | None = None
    ) -> Outcome:
        """On a copy of `rows`, with the gradient in place or in a tensor of dtype `apart`, then both as in a workspace."""
        return run(self.function, rows, dtype, self.outputs, self.device, gradient, apart)

    def run_peer(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Outcome:
        return run(self.peer, rows.to(dtype).added(), dtype, self.outputs)

    def defined(self, rows: Rows, dtype: torch.dtype = torch.float64) -> Outcome:
        """Values of the definition, and the gradient of the first one by autograd."""
        rows = rows.to(dtype)
        x = rows.x.clone().requires_grad_()
        values = self.definition(*rows._replace(x=x).logits(), rows.y)
        (gradient,) = torch.autograd.grad(values[0].sum(), x)
        return Outcome(values.detach(), gradient)

    def assert_right(self, rows: Rows, dtype: torch.dtype = torch.float32) -> Outcome:
        """As accurate as the peer, on exactly the same scores."""
        rows = rows.to(dtype)
        ours, exact = self.run(rows, dtype), self.run_peer(rows, torch.float64)
        assert_accurate(self, ours, self.run_peer(rows), exact, rows)
        return ours


def run(
    function: RowFunction,
    rows: Rows,
    dtype: torch.dtype,
    outputs: int,
    device: str = "cpu",
    gradient: bool = True,
    apart: torch.dtype | None = None,
) -> Outcome:
    rows = rows.to(dtype, device)
    x = rows.x.clone() if apart is None else laid_out(rows.x)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((outputs, x.shape[0]), torch.nan, dtype=out_dtype, device=device)
    into = None if not gradient else x if apart is None else laid_out(torch.full_like(x, torch.nan, dtype=apart))
    factor = function(Logits(x, rows.caps[0], rows.x_t.clone(), rows.caps[1], *rows.biases), rows.y, out, into)
    if factor is not None and into is not None:
        into = into.float() * factor[:, None]
    return Outcome(out.cpu(), (x if into is None else into).cpu())


def assert_accurate(tested: UnderTest, ours: Outcome, peer: Outcome, exact: Outcome, rows: Rows) -> None:
    """Values infinite or NaN where float64 has them; elsewhere the rule of the losses.

    Where the gradient jumps, rows in which float32 may land on the other side count by their values alone.
    """
    eps = torch.finfo(torch.float32).eps
    capped = [largest(z) for z, cap in zip(rows.to(torch.float64).logits(), rows.caps, strict=True) if cap is not None]
    z_size = max([1.0, *capped])  # a capped logit is rounded after its tanh
    own = torch.finfo(rows.x.dtype).eps if rows.x.dtype == torch.bfloat16 else 0.0
    size = eps * z_size * max(1.0, largest(finite(exact.values)))  # of the values, and of the log-ratios in a gradient
    steep = largest(finite(exact.gradient))  # a wide cap multiplies it
    slacks = (tested.slack * size, size * max(1.0, steep) + own * steep)
    kept = exact.gradient.isfinite().all(-1)
    if tested.steps:
        kept &= ~tied(rows)
    assert not ours.gradient[exact.gradient.isnan().all(-1)].isfinite().any()
    for field, slack in zip(Outcome._fields, slacks, strict=True):
        got, other, true = (getattr(o, field) for o in (ours, peer, exact))
        if field == "gradient":
            got, other, true = got[kept], other[kept], true[kept]
        elif (
            capped and tested.outputs > 2
        ):  # which of the saturated logits is the first largest is a matter of rounding
            got, other, true = got[:-1], other[:-1], true[:-1]
        assert torch.equal(got.isnan(), true.isnan()), field
        assert torch.equal(got.isinf(), true.isinf()), field
        assert_as_accurate(field, finite(got), finite(other), finite(true), slack)


def assert_terms_accurate(ours: Outcome, peer: Outcome, exact: Outcome, own: float = 0.0) -> None:
    """Finite where float64 is, and there as accurate as the peer; `own` is the rounding of a gradient's own dtype."""
    for field, got, other, true in zip(Outcome._fields, ours, peer, exact, strict=True):
        at = true.isfinite()
        assert torch.equal(got.isfinite(), at), field
        slack = 4e-7 * max(1.0, largest(true[at])) + (own * largest(true[at]) if field == "gradient" else 0.0)
        assert_as_accurate(field, got[at].float(), other[at], true[at], slack)


def assert_same_bits(ours: Outcome, other: Outcome) -> None:
    for got, expected in zip(ours, other, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


def hard_rows(vocabulary: int, cap: float | None) -> Rows:
    """Ordinary rows, a flat one, a one-hot one, one far down, and one with forbidden tokens."""
    x = random_rows(6, vocabulary).x
    x[1] = 0.5
    x[2, 3] = 60.0
    x[3] -= 300.0
    x[4, :: vocabulary // 2] = -INF
    x = x if cap is None else x / 4.0
    return Rows(x, x, torch.tensor([1, vocabulary - 1, 3, 0, 1, 2]), (cap, None))


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


def biases(vocabulary: int) -> Biases:
    """Of two heads. Each forbids a token that the other allows, and both forbid one."""
    b, b_t = torch.randn(2, vocabulary, generator=generator(vocabulary))
    for bias, own in ((b, 1), (b_t, 2)):
        bias[[own % vocabulary, vocabulary // 2]] = -INF
    return b, b_t


def close_rows(n: int, vocabulary: int, distance: float = 1e-2, seed: int = 0) -> Rows:
    g = generator(seed)
    x = torch.randn(n, vocabulary, generator=g) * 2.0
    shift = torch.randn(n, vocabulary, generator=g) * distance
    return Rows(x, x + shift, torch.randint(vocabulary, (n,), generator=g))


def poisoned(rows: Rows, poison: str, side: int = 0) -> Rows:
    """Of the student's or the teacher's scores, the second row made undefined: near its end, or all of it."""
    row = (rows.x, rows.x_t)[side][1]
    row.fill_(-INF) if poison == "all -inf" else row[-2].fill_(float(poison))
    return rows


def edge(width: int, *entries: tuple[int, float], fill: float = 0.0) -> Tensor:
    """A row of `fill` with some entries set."""
    row = torch.full((width,), fill)
    for column, value in entries:
        row[column] = value
    return row


def ramp(width: int, shift: float = 0.0) -> Tensor:
    return shift + torch.arange(width) % 64 / 8.0


def edges(width: int, block: int) -> dict[str, Rows]:
    """Rows of `width` columns; what a kernel holds at a time ends at `block`. Margins of 2000 underflow in float64 too."""
    row, up, last = partial(edge, width), partial(ramp, width), width - 1
    tail, steps = torch.arange(width) >= block, torch.arange(width) / 16.0
    cases = {  # student, teacher, token
        "one-hot, its token": (row((5, 200.0)), row((5, 180.0)), 5),
        "one-hot, another": (row((5, 200.0)), row((5, 180.0)), 6),
        "one-hot in the last column": (row((last, 200.0)), row((last, 100.0)), last),
        "apart": (row((5, 200.0)), row((6, 200.0)), 5),
        "far apart": (row((5, 2e3)), row((6, 2e3)), 5),
        "flat": (row(), row(), 3),
        "flat, far down": (row(fill=-300.0), row(fill=-200.0), 3),
        "all below -100": (up(-150.0), up(-120.0).flip(0), last),
        "far up": (up(1e4), up(-1e4).flip(0), 1),
        "plus and minus 1e4": (1e4 * (1.0 - 2.0 * (torch.arange(width) % 2)), up(1e4), 2),
        "two at the top": (row((1, 50.0), (last, 50.0)), row((1, 40.0), (2, 40.0)), 1),
        "forbidden": (row((0, -INF), (last, -INF)), up(), 3),
        "the token forbidden": (row((3, -INF)), up(), 3),
        "both forbid": (row((3, -INF)), row((3, -INF)), 4),
        "each forbids another": (row((3, -INF)), row((4, -INF)), 5),
        "first block forbidden": (up().where(tail, -INF), up(2.0), last),
        "both forbid the first block": (up().where(tail, -INF), up(2.0).where(tail, -INF), last),
        "last block forbidden": (up().where(~tail, -INF), up(1.0).where(~tail, -INF), 2),
        "no token in common": (up().where(tail, -INF), up().where(~tail, -INF), 2),
        "forbidden what underflows": (row((0, 2e3)), row((0, 2e3), (3, -INF)), 0),
        "forbidden what underflows later": (row((last, 2e3)), row((last, 9.0), (3, -INF)), last),
        "a forbidden block that underflows": (row((last, 2e3)), up().where(tail, -INF), 0),
        "both at the lowest number": (up().where(tail, LOWEST), up(1.0).where(tail, LOWEST), last),
        "raised step by step": (steps, steps / 2.0, last),
        "one rises, one falls": (steps, -steps, 0),
        "one falls, one rises": (-steps, steps, 0),
    }
    return {name: Rows(x[None], x_t[None], torch.tensor([y])) for name, (x, x_t, y) in cases.items()}


def laid_out(t: Tensor) -> Tensor:
    """A copy of [n, V] whose rows begin at multiples of 64 elements, as those of a workspace; between them is NaN."""
    n, width = t.shape
    return t.new_full((n, -(-width // 64) * 64 + 64), torch.nan)[:, :width].copy_(t)


def gap(t: Tensor) -> Tensor:
    """What lies between the rows of `laid_out`."""
    return t.as_strided((t.shape[0], t.stride(0)), t.stride())[:, t.shape[1] :]


def rows_far_apart(device: str, folder: Path) -> Tensor:
    """[3, 50] bf16; the third row starts 2³¹ + 32 elements after the first. On a CPU the 4 GB are a file, mostly hole."""
    stride, width = 2**30 + 16, 50
    numel = 2 * stride + width
    if device == "cpu":
        storage = torch.from_file(str(folder / "chunk"), shared=True, size=numel, dtype=torch.bfloat16)
    else:
        storage = torch.empty(numel, dtype=torch.bfloat16, device=device)
    return storage.as_strided((3, width), (stride, 1))
