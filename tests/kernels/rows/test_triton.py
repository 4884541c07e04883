"""`token_nll` in Triton against float64, at least as accurate as that in PyTorch, and with the same rules at the edges.

It runs on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import row_cases
import torch
from devices import triton_device
from loss_cases import assert_as_accurate, generator, largest
from row_cases import rows_far_apart
from torch import Tensor

from fastkl import reference
from fastkl.kernels.rows import pytorch as rows_torch
from fastkl.kernels.rows import triton as rows_triton
from fastkl.kernels.rows.interface import Logits, RowFunction
from fastkl.kernels.rows.launch import launch_config

DEVICE = triton_device()
# A chunk of bf16 is stored as such: rounded to 8 bits on a GPU, cut off after them by the interpreter.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPS = {"plain": None, "capped": 2.5, "wide-capped": 30.0}
INF = math.inf
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


class Rows(NamedTuple):
    """A chunk of scaled scores and what belongs to it."""

    x: Tensor  # [n, V]
    y: Tensor  # [n]
    cap: float | None = None

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Rows:
        return self._replace(x=self.x.to(device, dtype), y=self.y.to(device))


class Outcome(NamedTuple):
    values: Tensor  # [1, n]
    gradient: Tensor  # [n, V]; without one the chunk as it was left


def run(
    function: RowFunction,
    rows: Rows,
    dtype: torch.dtype,
    device: str = "cpu",
    gradient: bool = True,
    apart: torch.dtype | None = None,
) -> Outcome:
    """A row function on a copy of `rows`, with the gradient in place or in a tensor of dtype `apart`."""
    rows = rows.to(dtype, device)
    x = rows.x.clone()
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((1, x.shape[0]), torch.nan, dtype=out_dtype, device=device)
    into = None if not gradient else x if apart is None else torch.full_like(x, torch.nan, dtype=apart)
    function(Logits(x, rows.cap), rows.y, out, into)
    return Outcome(out.cpu(), (x if into is None else into).cpu())


def run_ours(
    rows: Rows, dtype: torch.dtype = torch.float32, gradient: bool = True, apart: torch.dtype | None = None
) -> Outcome:
    return run(rows_triton.token_nll, rows, dtype, DEVICE, gradient, apart)


def assert_accurate(rows: Rows, dtype: torch.dtype = torch.float32) -> None:
    """Infinities and NaN where float64 has them; elsewhere the rule of the losses, on exactly the same logits."""
    rows = rows.to(dtype)
    ours = run_ours(rows, dtype)
    peer, exact = (run(rows_torch.token_nll, rows, d) for d in (torch.float32, torch.float64))
    eps = torch.finfo(torch.float32).eps
    z_size = 1.0 if rows.cap is None else max(1.0, largest(rows.cap * torch.tanh(rows.x.double())))
    own = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    size = eps * z_size * max(1.0, largest(finite(exact.values)))  # a capped logit is rounded after its tanh
    steep = largest(finite(exact.gradient))  # a wide cap multiplies it
    slacks = (2 * size, size * max(1.0, steep) + own * steep)
    for field, slack in zip(Outcome._fields, slacks, strict=True):
        got, other, true = (getattr(o, field) for o in (ours, peer, exact))
        assert torch.equal(got.isnan(), true.isnan())
        assert torch.equal(got.isinf(), true.isinf())
        assert_as_accurate(field, finite(got), finite(other), finite(true), slack)


def finite(t: Tensor) -> Tensor:
    return t.where(t.isfinite(), 0.0)


def random_rows(n: int, vocabulary: int) -> Rows:
    g = generator(0)
    return Rows(torch.randn(n, vocabulary, generator=g) * 2.0, torch.randint(vocabulary, (n,), generator=g))


BLOCK = launch_config(1).block


# 7 and 1009: primes. Around one block and two. 50257: odd, many blocks.
@dtypes
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 1009, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17, 50257])
def test_widths(vocabulary: int, dtype: torch.dtype) -> None:
    assert_accurate(random_rows(3, vocabulary), dtype)


@dtypes
@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
def test_soft_caps(cap: float | None, dtype: torch.dtype) -> None:
    """Scores from those that tanh leaves alone to those that it saturates."""
    rows = random_rows(6, BLOCK + 5)
    scale = torch.tensor([1e-3, 0.05, 0.25, 1.0, 4.0, 50.0])[:, None]
    assert_accurate(rows._replace(x=rows.x * scale, cap=cap), dtype)


def test_a_wide_soft_cap_costs_no_digits() -> None:
    """Where the cap is 1000 and logits are near 2, tanh(x) ≈ x must be right relative to x."""
    rows = random_rows(3, BLOCK + 5)
    assert_accurate(rows._replace(x=rows.x / 1e3, cap=1e3))


@pytest.mark.parametrize("cap", [None, 2.5])
def test_equals_the_definition(cap: float | None) -> None:
    """Straight against `fastkl.reference` and autograd, without the PyTorch row functions in between."""
    rows = random_rows(4, 2 * BLOCK + 17)._replace(cap=cap)
    x = rows.x.double().requires_grad_()
    value = -reference.logprobs(x if cap is None else cap * torch.tanh(x), rows.y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    ours = run_ours(rows)
    torch.testing.assert_close(ours.values[0].double(), value.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.gradient.double(), gradient, rtol=1e-5, atol=5e-7)


WIDE = BLOCK + 3  # two blocks
edge, ramp = partial(row_cases.edge, WIDE), partial(row_cases.ramp, WIDE)
TAIL = torch.arange(WIDE) >= BLOCK  # the second block
# A row and its token.
EDGES: dict[str, tuple[Tensor, int]] = {
    "one-hot, its token": (edge((5, 200.0)), 5),
    "one-hot, another": (edge((5, 200.0)), 6),
    "one-hot in the last column": (edge((WIDE - 1, 200.0)), WIDE - 1),
    "one-hot that underflows the others in float64 too": (edge((WIDE - 1, 2e3)), 0),
    "flat": (edge(), 3),
    "flat, far down": (edge(fill=-300.0), 3),
    "all below -100": (ramp(-150.0), WIDE - 1),
    "far up": (ramp(1e4), 1),
    "plus and minus 1e4": (1e4 * (1.0 - 2.0 * (torch.arange(WIDE) % 2)), 2),
    "two at the top": (edge((1, 50.0), (WIDE - 1, 50.0)), 1),
    "some forbidden": (edge((0, -INF), (WIDE - 1, -INF)), 3),
    "the token forbidden": (edge((3, -INF)), 3),
    "the first block forbidden": (ramp().where(TAIL, -INF), WIDE - 1),
    "the last block forbidden": (ramp().where(~TAIL, -INF), 2),
    "the first block at the lowest number": (ramp().where(TAIL, torch.finfo(torch.float32).min), WIDE - 1),
    "raised step by step": (torch.arange(WIDE) / 16.0, WIDE - 1),
    "falling": (torch.arange(WIDE) / -16.0, 0),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str) -> None:
    x, y = EDGES[case]
    assert_accurate(Rows(x[None], torch.tensor([y])))


@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
def test_what_is_undefined_is_nan(poison: str) -> None:
    rows = random_rows(3, WIDE)
    rows.x[1] = -INF if poison == "all -inf" else rows.x[1].index_fill(0, torch.tensor(WIDE - 2), float(poison))
    values, gradient = run_ours(rows)
    assert values[0].isnan().tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all()
    assert not gradient[1].isfinite().any()


@pytest.mark.parametrize("y", [-1, -100, WIDE, 2**40])
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    """Nothing is read there, nothing is written, and a wrong id cannot pass unseen."""
    values, gradient = run_ours(random_rows(2, WIDE)._replace(y=torch.tensor([5, y])))
    assert values[0].isnan().tolist() == [False, True]
    assert gradient[0].isfinite().all()
    assert gradient[1].isnan().all()


def test_without_gradient_the_chunk_stays() -> None:
    rows = random_rows(3, WIDE)
    values, chunk = run_ours(rows, gradient=False)
    assert torch.equal(chunk, rows.x)
    assert torch.equal(values, run_ours(rows).values)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("apart", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_apart(apart: torch.dtype, cap: float | None) -> None:
    """What is written elsewhere, in the dtype of the next GEMM, is what would have been written in place, rounded."""
    rows = random_rows(3, WIDE)._replace(cap=cap)
    expected, ours = run_ours(rows), run_ours(rows, apart=apart)
    assert ours.gradient.dtype == apart
    assert torch.equal(ours.values, expected.values)
    rounding = torch.finfo(apart).eps if apart == torch.bfloat16 else torch.finfo(apart).eps / 2  # bf16 is cut off here
    torch.testing.assert_close(ours.gradient.float(), expected.gradient, rtol=rounding, atol=6e-8)


def test_no_rows() -> None:
    values, gradient = run_ours(random_rows(0, 12))
    assert (values.shape[1], gradient.shape) == (0, (0, 12))


def test_same_bits_whatever_the_rows_around() -> None:
    rows = random_rows(5, WIDE)
    whole, again = run_ours(rows), run_ours(rows)
    for i in range(5):
        alone = run_ours(Rows(rows.x[i : i + 1], rows.y[i : i + 1]))
        assert torch.equal(alone.values[:, 0], whole.values[:, i])
        assert torch.equal(alone.gradient[0], whole.gradient[i])
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.gradient, whole.gradient)


def test_strides() -> None:
    """Rows with a gap between them, results in the columns of a wider buffer, every second token."""
    rows = random_rows(3, WIDE).to(torch.float32, DEVICE)
    wide = torch.full((3, WIDE + 40), 7.0, device=DEVICE)
    wide[:, :WIDE] = rows.x
    buffer = torch.full((2, 6), 7.0, device=DEVICE)
    chunk = wide[:, :WIDE]
    rows_triton.token_nll(Logits(chunk), rows.y.repeat_interleave(2)[::2], buffer[1:, ::2], chunk)
    expected = run_ours(rows)
    assert torch.equal(buffer[1:, ::2].cpu(), expected.values)
    assert torch.equal(chunk.cpu(), expected.gradient)
    assert (wide[:, WIDE:] == 7.0).all()
    assert int((buffer == 7.0).sum()) == buffer.numel() - 3


def test_offsets_beyond_int32(tmp_path: Path) -> None:
    chunk = rows_far_apart(DEVICE, tmp_path)
    rows = random_rows(*chunk.shape)
    chunk.copy_(rows.x)
    expected = run_ours(rows, torch.bfloat16)
    values = torch.empty_like(expected.values, device=DEVICE)
    rows_triton.token_nll(Logits(chunk), rows.y.to(DEVICE), values, chunk)
    assert torch.equal(values.cpu(), expected.values)
    assert torch.equal(chunk.cpu(), expected.gradient)


def test_what_is_refused() -> None:
    x, y = (t.to(DEVICE) for t in random_rows(2, 8)[:2])
    out = torch.empty(1, 2, device=DEVICE)
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, not torch.float64: pass .*rows_torch"):
        rows_triton.token_nll(Logits(x.double()), y, out, None)
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16 or torch.float16, not torch.float64"):
        rows_triton.token_nll(Logits(x), y, out, x.double())
    with pytest.raises(ValueError, match=r"side by side"):
        rows_triton.token_nll(Logits(x.t().contiguous().t()), y, out, None)
