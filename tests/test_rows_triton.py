"""The Triton row functions against float64, at least as accurate as those in PyTorch, and with the same rules at the edges.

They run on a GPU where there is one, and else in Triton's interpreter, which has to be chosen before Triton is imported:
`TRITON_INTERPRET=1 pytest tests/test_rows_triton.py`, as test_rows_triton_interpreted.py does.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from loss_cases import assert_as_accurate, generator, largest
from torch import Tensor

from fastkl import reference
from fastkl.kernels import rows_torch, rows_triton
from fastkl.kernels.rows import Logits, RowFunction
from fastkl.kernels.rows_triton import launch_config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("no GPU; test_rows_triton_interpreted.py runs these tests", allow_module_level=True)

# A chunk of bf16 is stored as such: rounded to 8 bits on a GPU, cut off after them by the interpreter.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPS: dict[str, tuple[float | None, float | None]] = {
    "plain": (None, None),
    "capped": (2.5, 2.5),
    "student-capped": (30.0, None),
    "teacher-capped": (None, 4.0),
}
INF = math.inf


class Rows(NamedTuple):
    """A chunk of scaled scores and what belongs to it."""

    x: Tensor  # [n, V]
    x_t: Tensor  # [n, V]
    y: Tensor | None  # [n]
    caps: tuple[float | None, float | None] = (None, None)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Rows:
        y = None if self.y is None else self.y.to(device)
        return Rows(self.x.to(device, dtype), self.x_t.to(device, dtype), y, self.caps)


class Outcome(NamedTuple):
    values: Tensor  # [K, n]
    gradient: Tensor  # [n, V]


def run(
    function: RowFunction,
    rows: Rows,
    dtype: torch.dtype,
    device: str = "cpu",
    gradient: bool = True,
    apart: torch.dtype | None = None,
) -> Outcome:
    """A row function on a copy of `rows`, with the gradient in place or in a tensor of dtype `apart`.

    Where there is no gradient, the chunk as it left it.
    """
    rows = rows.to(dtype, device)
    heads = 1 if function.__name__ == "token_nll" else 2
    x, x_t = rows.x.clone(), rows.x_t.clone()
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((heads, x.shape[0]), torch.nan, dtype=out_dtype, device=device)
    logits = Logits(x, rows.caps[0], *((x_t, rows.caps[1]) if heads == 2 else (None, None)))
    into = None if not gradient else x if apart is None else torch.full_like(x, torch.nan, dtype=apart)
    function(logits, rows.y, out, into)
    return Outcome(out.cpu(), (x if into is None else into).cpu())


def run_ours(name: str, rows: Rows, dtype: torch.dtype = torch.float32, gradient: bool = True) -> Outcome:
    return run(getattr(rows_triton, name), rows, dtype, DEVICE, gradient)


def run_peer(name: str, rows: Rows, dtype: torch.dtype) -> Outcome:
    return run(getattr(rows_torch, name), rows, dtype)


def assert_accurate(name: str, rows: Rows, dtype: torch.dtype = torch.float32) -> None:
    """Infinities and NaN where float64 has them; elsewhere the rule of the losses, on exactly the same logits."""
    rows = rows.to(dtype)
    ours = run_ours(name, rows, dtype)
    peer, exact = run_peer(name, rows, torch.float32), run_peer(name, rows, torch.float64)
    eps = torch.finfo(torch.float32).eps
    capped = [c * torch.tanh(x.double()) for x, c in zip((rows.x, rows.x_t), rows.caps, strict=True) if c is not None]
    z_size = max([1.0, *map(largest, capped)])  # a capped logit is rounded after its tanh
    own = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    size = eps * z_size * max(1.0, largest(finite(exact.values)))  # of the values, and of the log-ratios in a gradient
    steep = largest(finite(exact.gradient))  # a wide cap multiplies it
    slacks = (2 * size, size * max(1.0, steep) + own * steep)
    for field, slack in zip(Outcome._fields, slacks, strict=True):
        got, other, true = (getattr(o, field) for o in (ours, peer, exact))
        assert torch.equal(got.isnan(), true.isnan())
        assert torch.equal(got.isinf(), true.isinf())
        assert_as_accurate(f"{name} {field}", finite(got), finite(other), finite(true), slack)


def finite(t: Tensor) -> Tensor:
    return t.where(t.isfinite(), 0.0)


def random_rows(n: int, vocabulary: int, spread: float = 2.0, seed: int = 0) -> Rows:
    g = generator(seed)
    x = torch.randn(n, vocabulary, generator=g) * spread
    x_t = x * 0.8 + torch.randn(n, vocabulary, generator=g) * 0.5
    return Rows(x, x_t, torch.randint(vocabulary, (n,), generator=g))


FUNCTIONS = ("token_nll", "reverse_kl")
ONE, TWO = launch_config(1).block, launch_config(2).block
# 7 and 1009: primes. Around one block, and around two and four (blocks of the two kernels differ). 50257: odd, many blocks.
WIDTHS = [1, 2, 7, 1009, TWO - 1, TWO, TWO + 1, ONE, ONE + 1, 2 * ONE + 17, 50257]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("vocabulary", WIDTHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_widths(name: str, vocabulary: int, dtype: torch.dtype) -> None:
    assert_accurate(name, random_rows(3, vocabulary), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("caps", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_soft_caps(name: str, caps: tuple[float | None, float | None], dtype: torch.dtype) -> None:
    """Scores from those that tanh leaves alone to those that it saturates."""
    rows = random_rows(6, ONE + 5)
    scale = torch.tensor([1e-3, 0.05, 0.25, 1.0, 4.0, 50.0])[:, None]
    assert_accurate(name, Rows(rows.x * scale, rows.x_t * scale, rows.y, caps), dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wide_soft_cap_costs_no_digits(name: str) -> None:
    """Where the cap is 1000 and logits are near 2, tanh(x) ≈ x must be right relative to x."""
    rows = random_rows(3, ONE + 5)
    assert_accurate(name, Rows(rows.x / 1e3, rows.x_t / 1e3, rows.y, (1e3, 1e3)))


@pytest.mark.parametrize("caps", list(CAPS.values())[:2], ids=list(CAPS)[:2])
def test_equals_the_definition(caps: tuple[float | None, float | None]) -> None:
    """Straight against `fastkl.reference` and autograd, without the PyTorch row functions in between."""
    rows = random_rows(4, 2 * ONE + 17)._replace(caps=caps)
    cap, cap_t = caps
    x, x_t = rows.x.double().requires_grad_(), rows.x_t.double()
    z = x if cap is None else cap * torch.tanh(x)
    z_t = x_t if cap_t is None else cap_t * torch.tanh(x_t)
    assert rows.y is not None
    nll, kl = -reference.logprobs(z, rows.y), reference.reverse_kl(z, z_t)
    for name, value in (("token_nll", nll), ("reverse_kl", kl)):
        (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        ours = run_ours(name, rows)
        torch.testing.assert_close(ours.values[0].double(), value.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.gradient.double(), gradient, rtol=1e-5, atol=5e-7)
    torch.testing.assert_close(run_ours("reverse_kl", rows).values[1].double(), nll.detach(), rtol=1e-6, atol=1e-6)


WIDE = TWO + 3  # two blocks of the divergence


def edge(*entries: tuple[int, float], fill: float = 0.0, width: int = WIDE) -> Tensor:
    """A row of `fill` with some entries set."""
    row = torch.full((width,), fill)
    for column, value in entries:
        row[column] = value
    return row


def ramp(shift: float = 0.0) -> Tensor:
    return shift + torch.arange(WIDE) % 64 / 8.0


TAIL = torch.arange(WIDE) >= TWO  # the second block
LOWEST = torch.finfo(torch.float32).min
# Student's row, teacher's row, token. Margins of 2000 underflow in float64 too, which is to follow the same rules.
EDGES: dict[str, tuple[Tensor, Tensor, int]] = {
    "one-hot, its token": (edge((5, 200.0)), edge((5, 180.0)), 5),
    "one-hot, another": (edge((5, 200.0)), edge((5, 180.0)), 6),
    "one-hot in the last column": (edge((WIDE - 1, 200.0)), edge((WIDE - 1, 100.0)), WIDE - 1),
    "apart": (edge((5, 200.0)), edge((6, 200.0)), 5),
    "flat": (edge(), edge(), 3),
    "flat, far down": (edge(fill=-300.0), edge(fill=-200.0), 3),
    "all below -100": (ramp(-150.0), ramp(-120.0).flip(0), WIDE - 1),
    "far up": (ramp(1e4), ramp(-1e4).flip(0), 1),
    "plus and minus 1e4": (1e4 * (1.0 - 2.0 * (torch.arange(WIDE) % 2)), ramp(1e4), 2),
    "two at the top": (edge((1, 50.0), (WIDE - 1, 50.0)), edge((1, 40.0), (2, 40.0)), 1),
    "student forbids": (edge((0, -INF), (WIDE - 1, -INF)), ramp(), 3),
    "student forbids the token": (edge((3, -INF)), ramp(), 3),
    "both forbid": (edge((3, -INF)), edge((3, -INF)), 4),
    "student forbids the first block": (ramp().where(TAIL, -INF), ramp(2.0), WIDE - 1),
    "both forbid the first block": (ramp().where(TAIL, -INF), ramp(2.0).where(TAIL, -INF), WIDE - 1),
    "student forbids the last block": (ramp().where(~TAIL, -INF), ramp(1.0).where(~TAIL, -INF), 2),
    "teacher forbids what underflows": (edge((0, 2e3)), edge((0, 2e3), (3, -INF)), 0),
    "teacher forbids what underflows later": (edge((WIDE - 1, 2e3)), edge((WIDE - 1, 9.0), (3, -INF)), WIDE - 1),
    "teacher forbids a block that underflows": (edge((WIDE - 1, 2e3)), ramp().where(TAIL, -INF), WIDE - 1),
    "student at the lowest number": (ramp().where(TAIL, LOWEST), ramp(), WIDE - 1),
    "both at the lowest number": (ramp().where(TAIL, LOWEST), ramp(1.0).where(TAIL, LOWEST), WIDE - 1),
    "raised step by step": (torch.arange(WIDE) / 16.0, torch.arange(WIDE) / 32.0, WIDE - 1),
    "student rises, teacher falls": (torch.arange(WIDE) / 16.0, torch.arange(WIDE) / -16.0, 0),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_edges(name: str, case: str) -> None:
    x, x_t, y = EDGES[case]
    rows = Rows(x[None], x_t[None], torch.tensor([y]))
    assert_accurate(name, rows)
    if name == "reverse_kl":
        values, gradient = run_ours(name, rows)
        assert values[0].isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("column", [0, WIDE - 1])
def test_a_probability_that_underflows_is_impossible(column: int) -> None:
    """e⁻²⁰⁰ is 0 in float32, whether the peak of the row comes before it or after: no teacher makes that infinite."""
    rows = Rows(edge((column, 200.0))[None], edge((column, 200.0), (3, -INF))[None], None)
    values, gradient = run_ours("reverse_kl", rows)
    assert (values == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("steps", [(LOWEST, LOWEST, 0.0), (0.0, 80.0, 160.0)], ids=["at once", "by and by"])
def test_what_has_underflowed_leaves_no_trace(steps: tuple[float, float, float]) -> None:
    """Three blocks; the first is forbidden to the teacher, and lost beside the third in the student."""
    x = torch.tensor(steps).repeat_interleave(TWO)[None]
    rows = Rows(x, ramp(2.0).repeat(3)[None, : 3 * TWO].index_fill(1, torch.arange(TWO), -INF), None)
    ours, peer = run_ours("reverse_kl", rows), run_peer("reverse_kl", rows, torch.float32)
    torch.testing.assert_close(ours.values, peer.values)
    torch.testing.assert_close(ours.gradient, peer.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("spread", [2.0, 1e4])
def test_a_student_like_its_teacher(spread: float, dtype: torch.dtype, capped: bool) -> None:
    """Exactly 0, value and gradient, not nearly."""
    rows = random_rows(4, 2 * ONE + 17, spread)
    x = rows.x.index_fill(1, torch.tensor([0, 77]), -INF)
    values, gradient = run_ours("reverse_kl", Rows(x, x, rows.y, (3.0, 3.0) if capped else (None, None)), dtype)
    assert (values[0] == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("column", [3, WIDE - 1])
def test_a_token_that_only_the_student_can_emit(column: int) -> None:
    """KL = +inf; the other rows of the chunk do not notice."""
    x, x_t = ramp().repeat(3, 1), ramp(1.0).flip(0).repeat(3, 1)
    clean = run_ours("reverse_kl", Rows(x, x_t, None))
    x_t[1, column] = -INF
    values, gradient = run_ours("reverse_kl", Rows(x, x_t, None))
    assert values[0, 1] == INF
    assert not gradient[1].isfinite().any()
    for field, dirty in ((clean.values, values), (clean.gradient.t(), gradient.t())):
        assert torch.equal(field[:, [0, 2]], dirty[:, [0, 2]])


@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_undefined_is_nan(name: str, poison: str) -> None:
    rows = random_rows(3, WIDE)
    for x in (rows.x,) if name == "token_nll" else (rows.x, rows.x_t):
        kept = x[1].clone()
        x[1] = x[1].fill_(-INF) if poison == "all -inf" else x[1].index_fill(0, torch.tensor(WIDE - 2), float(poison))
        values, gradient = run_ours(name, rows)
        assert values[0].isnan().tolist() == [False, True, False]
        assert gradient[[0, 2]].isfinite().all()
        assert not gradient[1].isfinite().any()
        x[1] = kept


@pytest.mark.parametrize("y", [-1, -100, WIDE, 2**40])
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    """Nothing is read there, nothing is written, and a wrong id cannot pass unseen."""
    rows = random_rows(2, WIDE)._replace(y=torch.tensor([5, y]))
    for name, k in (("token_nll", 0), ("reverse_kl", 1)):
        values, gradient = run_ours(name, rows)
        assert values[k].isnan().tolist() == [False, True]
        assert gradient[1].isnan().all() == (name == "token_nll")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_gradient_the_chunk_stays(name: str) -> None:
    rows = random_rows(3, WIDE)
    values, chunk = run_ours(name, rows, gradient=False)
    assert torch.equal(chunk, rows.x)
    assert torch.equal(values, run_ours(name, rows).values)


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("apart", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradient_apart(name: str, apart: torch.dtype, capped: bool) -> None:
    """What is written elsewhere, in the dtype of the next GEMM, is what would have been written in place, rounded."""
    rows = random_rows(3, WIDE)._replace(caps=(3.0, 3.0) if capped else (None, None))
    expected = run_ours(name, rows)
    ours = run(getattr(rows_triton, name), rows, torch.float32, DEVICE, apart=apart)
    assert ours.gradient.dtype == apart
    assert torch.equal(ours.values, expected.values)
    rounding = torch.finfo(apart).eps if apart == torch.bfloat16 else torch.finfo(apart).eps / 2  # bf16 is cut off here
    torch.testing.assert_close(ours.gradient.float(), expected.gradient, rtol=rounding, atol=6e-8)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_rows(name: str) -> None:
    values, gradient = run_ours(name, random_rows(0, 12))
    assert (values.shape[1], gradient.shape) == (0, (0, 12))


def test_no_tokens() -> None:
    rows = random_rows(3, WIDE)
    values, gradient = run_ours("reverse_kl", rows._replace(y=None))
    expected = run_ours("reverse_kl", rows)
    assert (values[1] == 0).all()
    assert torch.equal(values[0], expected.values[0])
    assert torch.equal(gradient, expected.gradient)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_bits_whatever_the_rows_around(name: str) -> None:
    rows = random_rows(5, WIDE)
    assert rows.y is not None
    whole, again = run_ours(name, rows), run_ours(name, rows)
    for i in range(5):
        alone = run_ours(name, Rows(rows.x[i : i + 1], rows.x_t[i : i + 1], rows.y[i : i + 1]))
        assert torch.equal(alone.values[:, 0], whole.values[:, i])
        assert torch.equal(alone.gradient[0], whole.gradient[i])
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.gradient, whole.gradient)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides(name: str) -> None:
    """Rows with a gap between them, results in the columns of a wider buffer, every second token."""
    rows = random_rows(3, WIDE).to(torch.float32, DEVICE)
    assert rows.y is not None
    wide = torch.full((3, WIDE + 40), 7.0, device=DEVICE)
    wide[:, :WIDE] = rows.x
    teacher = torch.cat([rows.x_t, rows.x_t], 1)[:, :WIDE] if name == "reverse_kl" else None
    buffer = torch.full((8, 6), 7.0, device=DEVICE)
    out = buffer[1::2, ::2].t()  # [3, 4]
    logits = Logits(wide[:, :WIDE], None, teacher, None)
    getattr(rows_triton, name)(logits, rows.y.repeat_interleave(2)[::2], out.t()[:2, :3], logits.student)
    expected = run_ours(name, rows)
    heads = expected.values.shape[0]
    assert torch.equal(buffer[1:5:2, 0:6:2][:heads].cpu(), expected.values)
    assert torch.equal(wide[:, :WIDE].cpu(), expected.gradient)
    assert (wide[:, WIDE:] == 7.0).all()
    assert int((buffer == 7.0).sum()) == buffer.numel() - 3 * heads


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_teacher_stays(name: str) -> None:
    rows = random_rows(3, WIDE).to(torch.float32, DEVICE)
    teacher = rows.x_t.clone()
    logits = Logits(rows.x, None, teacher, None)
    getattr(rows_triton, name)(logits, rows.y, torch.empty(2, 3, device=DEVICE), rows.x)
    assert torch.equal(teacher, rows.x_t)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_offsets_beyond_int32(name: str, tmp_path: Path) -> None:
    """The third row starts 2³¹ + 32 elements after the first. On a CPU the 4 GB are a file that is mostly hole."""
    stride, width = 2**30 + 16, 50
    numel = 2 * stride + width
    if DEVICE == "cpu":
        storage = torch.from_file(str(tmp_path / "chunk"), shared=True, size=numel, dtype=torch.bfloat16)
    else:
        storage = torch.empty(numel, dtype=torch.bfloat16, device=DEVICE)
    chunk = storage.as_strided((3, width), (stride, 1))
    rows = random_rows(3, width)
    chunk.copy_(rows.x)
    expected = run_ours(name, rows, torch.bfloat16)
    values = torch.empty_like(expected.values, device=DEVICE)
    x_t = rows.x_t.to(DEVICE, torch.bfloat16)
    assert rows.y is not None
    getattr(rows_triton, name)(Logits(chunk, None, x_t, None), rows.y.to(DEVICE), values, chunk)
    assert torch.equal(values.cpu(), expected.values)
    assert torch.equal(chunk.cpu(), expected.gradient)


def test_what_is_refused() -> None:
    rows = random_rows(2, 8).to(torch.float64, DEVICE)
    out = torch.empty(2, 2, device=DEVICE)
    for name in FUNCTIONS:
        with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, not torch.float64: pass .*rows_torch"):
            getattr(rows_triton, name)(Logits(rows.x, None, rows.x_t, None), rows.y, out, rows.x)
        columns = rows.x.float().t().contiguous().t()
        with pytest.raises(ValueError, match=r"side by side"):
            getattr(rows_triton, name)(Logits(columns, None, rows.x_t.float(), None), rows.y, out, None)
        with pytest.raises(TypeError, match=r"float32 or torch.bfloat16 or torch.float16, not torch.float64"):
            getattr(rows_triton, name)(Logits(rows.x.float(), None, rows.x_t.float(), None), rows.y, out, rows.x)
