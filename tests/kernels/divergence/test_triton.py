"""The divergences in Triton against float64, as accurate as those in PyTorch, and with the same rules at the edges.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from devices import triton_device
from divergence_cases import (
    EXTREME,
    INF,
    KINDS,
    LOWEST,
    Kind,
    Outcome,
    Rows,
    assert_accurate,
    close_rows,
    edges,
    random_rows,
    run,
)
from row_cases import rows_far_apart

from fastkl import reference
from fastkl.kernels.divergence import pytorch as divergence_torch
from fastkl.kernels.divergence.formula import ROWS_WITH_EXTRAS, Extras
from fastkl.kernels.divergence.triton import divergence
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.launch import launch_config

DEVICE = triton_device()

# A chunk of bf16 is stored as such: rounded to 8 bits on a GPU, cut off after them by the interpreter.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPS: dict[str, tuple[float | None, float | None]] = {
    "capped": (2.5, 2.5),
    "student-capped": (30.0, None),
    "teacher-capped": (None, 4.0),
}
BLOCK = launch_config(2).block
NARROW, WIDE = 40, BLOCK + 3  # one block and two; the interpreter takes about 10 ms for a row of a block
EDGES = edges(BLOCK)
ONCE = KINDS[0]  # where the kind is beside the point
slow = pytest.mark.slow


def run_ours(
    kind: Kind, rows: Rows, dtype: torch.dtype = torch.float32, gradient: bool = True, extras: bool = False
) -> Outcome:
    return run(divergence, kind, rows, dtype, DEVICE, gradient, extras=extras)


def run_peer(kind: Kind, rows: Rows, dtype: torch.dtype = torch.float32, extras: bool = False) -> Outcome:
    return run(divergence_torch.divergence, kind, rows, dtype, extras=extras)


def assert_right(kind: Kind, rows: Rows, dtype: torch.dtype = torch.float32, extras: bool = False) -> Outcome:
    rows = rows.to(dtype)
    ours = run_ours(kind, rows, dtype, extras=extras)
    peer, exact = (run_peer(kind, rows, d, extras) for d in (torch.float32, torch.float64))
    assert_accurate(str(kind), ours, peer, exact, rows, steps=kind.name == "total_variation")
    return ours


# 7 and 1009: primes. 50257: odd, many blocks.
WIDTHS = [(1, "fp32"), (7, "bf16"), (1009, "fp32"), (BLOCK, "fp32"), (BLOCK + 1, "bf16")]
MORE_WIDTHS = [(width, dtype) for width in (2, BLOCK - 1, 2 * BLOCK + 17, 50257) for dtype in DTYPES]


@pytest.mark.parametrize(("vocabulary", "dtype"), [*WIDTHS, *[pytest.param(*w, marks=slow) for w in MORE_WIDTHS]])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_widths(kind: Kind, vocabulary: int, dtype: str) -> None:
    assert_right(kind, random_rows(2, vocabulary), DTYPES[dtype], extras=kind == ONCE)


@pytest.mark.parametrize("kind", EXTREME, ids=str)
def test_parameters_near_their_ends(kind: Kind) -> None:
    assert_right(kind, random_rows(1, WIDE))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_small_divergences(kind: Kind) -> None:
    assert_right(kind, close_rows(1, WIDE), extras=kind == ONCE)


@pytest.mark.parametrize(
    ("caps", "dtype"),
    [
        ("capped", "fp32"),
        *[pytest.param(c, d, marks=slow) for c in CAPS for d in DTYPES if (c, d) != ("capped", "fp32")],
    ],
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_soft_caps(kind: Kind, caps: str, dtype: str) -> None:
    """Scores from those that tanh leaves alone to those that it saturates."""
    rows = random_rows(4, WIDE)
    scale = torch.tensor([1e-3, 0.25, 4.0, 50.0])[:, None]
    rows = rows._replace(x=rows.x * scale, x_t=rows.x_t * scale, caps=CAPS[caps])
    assert_right(kind, rows, DTYPES[dtype], extras=kind == ONCE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_wide_soft_cap_costs_no_digits(kind: Kind) -> None:
    """Where the cap is 1000 and logits are near 2, tanh(x) ≈ x must be right relative to x."""
    rows = random_rows(1, WIDE)
    assert_right(kind, rows._replace(x=rows.x / 1e3, x_t=rows.x_t / 1e3, caps=(1e3, 1e3)))


@pytest.mark.parametrize("caps", [CAPS["student-capped"], CAPS["teacher-capped"]], ids=str)
def test_each_side_has_its_own_cap(caps: tuple[float | None, float | None]) -> None:
    for kind in (ONCE, Kind("jsd", 0.5)):
        assert_right(kind, random_rows(1, NARROW)._replace(caps=caps), extras=True)


@pytest.mark.parametrize("caps", [(None, None), (2.5, 3.5)], ids=["plain", "capped"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_the_definition(kind: Kind, caps: tuple[float | None, float | None]) -> None:
    """Straight against `fastkl.reference` and autograd, without the PyTorch row functions in between.

    Two tokens are forbidden on both sides, but for what a cap brings back.
    """
    rows = random_rows(1, WIDE)._replace(caps=caps, y=torch.tensor([5]))
    for x in (rows.x, rows.x_t):
        x[0, [3, WIDE - 1]] = -INF
    double = rows.to(torch.float64)
    x = double.x.requires_grad_()
    z, z_t = double.logits()
    value, nll = kind.of(z, z_t), -reference.logprobs(z.detach(), torch.tensor([5]))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    ours = run_ours(kind, rows)
    torch.testing.assert_close(ours.values.double(), torch.stack([value.detach(), nll]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.gradient.double(), gradient, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str) -> None:
    """Both KLs, one among the extras of the other, and two of the kinds that are always finite."""
    assert_right(Kind("forward_kl"), EDGES[case], extras=True)
    assert_right(ONCE, EDGES[case])
    for kind in (Kind("jsd", 0.5), Kind("skewed_forward_kl", 0.1)):
        values, gradient = assert_right(kind, EDGES[case])
        assert values[0].isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "forward_kl"], ids=str)
def test_a_student_at_the_lowest_number(kind: Kind) -> None:
    """In the second block, without being forbidden; the forward KL of that exceeds float32."""
    ramp = torch.arange(WIDE)[None] % 64 / 8.0
    values, gradient = assert_right(kind, Rows(ramp.where(torch.arange(WIDE) < BLOCK, LOWEST), ramp))
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@slow
@pytest.mark.parametrize("case", EDGES)
def test_edges_from_both_sides_and_with_any_parameter(case: str) -> None:
    for rows in (EDGES[case], EDGES[case].swapped()):
        for kind in (*KINDS, *EXTREME):
            assert_right(kind, rows, extras=True)


@pytest.mark.parametrize("column", [0, WIDE - 1])
def test_a_probability_that_underflows_is_impossible(column: int) -> None:
    """e⁻²⁰⁰ is 0 in float32, whether the peak of the row comes before it or after: nothing makes that infinite."""
    x = torch.zeros(1, WIDE)
    x[0, column] = 200.0
    rows = Rows(x, x.index_fill(1, torch.tensor(3), -INF))
    for kind in KINDS:
        values, gradient = run_ours(kind, rows.swapped() if kind.name == "forward_kl" else rows)
        assert (values == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("steps", [(LOWEST, LOWEST, 0.0), (0.0, 80.0, 160.0)], ids=["at once", "by and by"])
def test_what_has_underflowed_leaves_no_trace(steps: tuple[float, float, float]) -> None:
    """Three blocks; the first is forbidden on one side, and lost beside the third on the other."""
    x = torch.tensor(steps).repeat_interleave(BLOCK)[None]
    x_t = (torch.arange(3 * BLOCK) % 64 / 8.0).index_fill(0, torch.arange(BLOCK), -INF)[None]
    for rows, name in ((Rows(x, x_t), "reverse_kl"), (Rows(x_t, x), "forward_kl")):
        kind = Kind(name)  # type: ignore[arg-type]
        ours, peer = run_ours(kind, rows), run_peer(kind, rows)
        torch.testing.assert_close(ours.values[0], peer.values[0])
        torch.testing.assert_close(ours.gradient, peer.gradient, rtol=1e-5, atol=1e-7)


EQUALS = [(2.0, "fp32", False), (1e4, "fp32", True), (1e4, "bf16", False), (2.0, "bf16", True)]


@pytest.mark.parametrize(("spread", "dtype", "capped"), EQUALS)
@pytest.mark.parametrize("kind", [*KINDS, *[pytest.param(k, marks=slow) for k in EXTREME]], ids=str)
def test_a_student_like_its_teacher(kind: Kind, spread: float, dtype: str, capped: bool) -> None:
    """Exactly 0, value and gradient, not nearly."""
    rows = random_rows(1, WIDE, spread)
    x = rows.x.index_fill(1, torch.tensor([0, 77]), -INF)
    ours = run_ours(kind, Rows(x, x, rows.y, (3.0, 3.0) if capped else (None, None)), DTYPES[dtype])
    assert (ours.values[0] == 0).all()
    assert (ours.gradient == 0).all()


def test_extras_of_a_student_like_its_teacher() -> None:
    rows = random_rows(2, WIDE)
    _, extras = run_ours(ONCE, rows._replace(x_t=rows.x), extras=True).outputs()
    assert (extras.reverse_kl == 0).all()
    assert (extras.forward_kl == 0).all()
    assert torch.equal(extras.entropy, extras.teacher_entropy)
    assert (extras.agreement == 1).all()


@pytest.mark.parametrize("column", [3, WIDE - 1])
def test_a_token_that_one_side_forbids(column: int) -> None:
    """The KL from the other side is +inf, of which the other rows of the chunk do not notice."""
    ramp = (torch.arange(WIDE) % 64 / 8.0).repeat(3, 1)
    clean = Rows(ramp, ramp + 1.0)
    dirty = Rows(clean.x.clone(), clean.x_t.clone())
    dirty.x_t[1, column] = -INF
    for rows, swapped, name in ((dirty, clean, "reverse_kl"), (dirty.swapped(), clean.swapped(), "forward_kl")):
        kind = Kind(name)  # type: ignore[arg-type]
        ours, expected = run_ours(kind, rows), run_ours(kind, swapped)
        assert ours.values[0, 1] == INF
        assert not ours.gradient[1].isfinite().any() or name == "forward_kl"
        assert torch.equal(ours.values[:, [0, 2]], expected.values[:, [0, 2]])
        assert torch.equal(ours.gradient[[0, 2]], expected.gradient[[0, 2]])


@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize(("kind", "width"), [*[(k, NARROW) for k in KINDS], (ONCE, WIDE)], ids=str)
def test_what_is_undefined_is_nan(kind: Kind, width: int, poison: str) -> None:
    """On either side, in the first block or in the last, and in its row alone."""
    for side in (0, 1):
        rows = random_rows(2, width)
        row = (rows.x, rows.x_t)[side][1]
        row.fill_(-INF) if poison == "all -inf" else row.index_fill_(0, torch.tensor(width - 2), float(poison))
        ours = run_ours(kind, rows, extras=True)
        (value, _, _), extras = ours.outputs()
        own = extras.teacher_entropy if side else extras.entropy
        for t in (value, own, extras.reverse_kl, extras.forward_kl, extras.agreement):
            assert t.isnan().tolist() == [False, True]
        assert ours.gradient.isnan().any(1).tolist() == ours.gradient.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("y", [-1, -100, NARROW, 2**40])
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    """Nothing is read there, nothing is written, and a wrong id cannot pass unseen."""
    ours = run_ours(ONCE, random_rows(2, NARROW)._replace(y=torch.tensor([5, y])), extras=True)
    (value, token_nll, _), extras = ours.outputs()
    assert token_nll.isnan().tolist() == extras.teacher_nll.isnan().tolist() == [False, True]
    assert value.isfinite().all()
    assert ours.gradient.isfinite().all()


def test_agreement_is_of_the_first_maximum() -> None:
    """Ties within a block, across blocks, and a maximum below 0 in a row that begins with forbidden tokens."""
    x, x_t = torch.zeros(5, WIDE), torch.zeros(5, WIDE)
    x[0, [7, 9, WIDE - 1]] = 3.0
    x_t[0, [7, WIDE - 2]] = 5.0
    x[1, [7, WIDE - 1]] = 3.0
    x_t[1, WIDE - 1] = 3.0
    x[2:], x_t[2:] = -9.0, -8.0
    x[2, : BLOCK + 1] = x_t[2, : BLOCK + 1] = -INF
    x[3, 0] = x_t[3, 1] = -INF
    rows = Rows(x, x_t)
    assert run_ours(ONCE, rows, extras=True).outputs()[1].agreement.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert run_peer(ONCE, rows, extras=True).outputs()[1].agreement.tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extras_change_nothing(kind: Kind) -> None:
    rows = random_rows(1, WIDE)
    with_extras, without = run_ours(kind, rows, extras=True), run_ours(kind, rows)
    assert torch.equal(with_extras.values[:2], without.values)
    assert torch.equal(with_extras.gradient, without.gradient)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_gradient_the_chunk_stays(kind: Kind) -> None:
    rows = random_rows(2, NARROW)
    values, chunk = run_ours(kind, rows, gradient=False)
    assert torch.equal(chunk, rows.x)
    assert torch.equal(values, run_ours(kind, rows).values)


@pytest.mark.parametrize("apart", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_apart(kind: Kind, apart: torch.dtype) -> None:
    """What is written elsewhere, in the dtype of the next GEMM, is what would have been written in place, rounded."""
    rows = random_rows(2, NARROW)._replace(caps=(3.0, 3.0))
    expected = run_ours(kind, rows)
    ours = run(divergence, kind, rows, torch.float32, DEVICE, apart=apart)
    assert ours.gradient.dtype == apart
    assert torch.equal(ours.values, expected.values)
    rounding = torch.finfo(apart).eps if apart == torch.bfloat16 else torch.finfo(apart).eps / 2  # bf16 is cut off here
    torch.testing.assert_close(ours.gradient.float(), expected.gradient, rtol=rounding, atol=6e-8)


def test_no_rows() -> None:
    values, gradient = run_ours(ONCE, random_rows(0, 12))
    assert (values.shape[1], gradient.shape) == (0, (0, 12))


def test_no_tokens() -> None:
    rows = random_rows(2, NARROW)
    ours, expected = (run_ours(ONCE, r, extras=True) for r in (rows._replace(y=None), rows))
    (value, token_nll, _), extras = ours.outputs()
    assert (token_nll == 0).all()
    assert (extras.teacher_nll == 0).all()
    assert torch.equal(value, expected.values[0])
    assert torch.equal(ours.gradient, expected.gradient)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_same_bits_whatever_the_rows_around(kind: Kind) -> None:
    rows = random_rows(2, WIDE)
    whole, again, alone = (run_ours(kind, r) for r in (rows, rows, rows.take(slice(1, 2))))
    assert torch.equal(again.values, whole.values)
    assert torch.equal(again.gradient, whole.gradient)
    assert torch.equal(alone.values[:, 0], whole.values[:, 1])
    assert torch.equal(alone.gradient[0], whole.gradient[1])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_strides(kind: Kind) -> None:
    """Rows with a gap between them, results in the columns of a wider buffer, every second token; the teacher stays."""
    rows = random_rows(3, NARROW).to(torch.float32, DEVICE)
    assert rows.y is not None
    wide = torch.full((3, NARROW + 40), 7.0, device=DEVICE)
    wide[:, :NARROW] = rows.x
    teacher = torch.cat([rows.x_t, rows.x_t], 1)[:, :NARROW]
    buffer = torch.full((6, 20), 7.0, device=DEVICE)
    out = buffer[::2, 1::2].t()[:ROWS_WITH_EXTRAS]  # [8, 3]
    logits = Logits(wide[:, :NARROW], None, teacher, None)
    divergence(*kind, logits, rows.y.repeat_interleave(2)[::2], out, logits.student)
    expected = run_ours(kind, rows, extras=True)
    assert torch.equal(out.cpu(), expected.values)
    assert torch.equal(wide[:, :NARROW].cpu(), expected.gradient)
    assert (wide[:, NARROW:] == 7.0).all()
    assert int((buffer == 7.0).sum()) == buffer.numel() - 3 * ROWS_WITH_EXTRAS
    assert torch.equal(teacher, rows.x_t)


def test_offsets_beyond_int32(tmp_path: Path) -> None:
    chunk = rows_far_apart(DEVICE, tmp_path)
    rows = random_rows(*chunk.shape).to(torch.bfloat16, DEVICE)
    for kind in (Kind("forward_kl"), Kind("jsd", 0.5)):
        for x, x_t in ((chunk, rows.x_t), (rows.x.clone(), chunk)):
            chunk.copy_(rows.x if x is chunk else rows.x_t)
            expected = run_ours(kind, rows, torch.bfloat16)
            values = torch.empty_like(expected.values, device=DEVICE)
            divergence(*kind, Logits(x, None, x_t, None), rows.y, values, x)
            assert torch.equal(values.cpu(), expected.values)
            assert torch.equal(x.cpu(), expected.gradient)


def test_bounds_of_the_bounded() -> None:
    """No token in common: the largest value there is."""
    rows = EDGES["no token in common"]
    bounds = {
        Kind("total_variation"): 1.0,
        Kind("jsd", 0.5): math.log(2.0),
        Kind("skewed_forward_kl", 0.1): -math.log(0.1),
        Kind("skewed_reverse_kl", 1e-4): -math.log(1e-4),
    }
    for kind, bound in bounds.items():
        assert float(run_ours(kind, rows).values[0]) == pytest.approx(bound, rel=1e-6)


def test_what_is_refused() -> None:
    rows = random_rows(2, 8).to(torch.float64, DEVICE)
    out = torch.empty(2, 2, device=DEVICE)
    x, x_t = rows.x.float(), rows.x_t.float()
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, not torch.float64: pass .*torch"):
        divergence(*ONCE, Logits(rows.x, None, x_t, None), None, out, None)
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16, not torch.float64: pass .*torch"):
        divergence(*ONCE, Logits(x, None, rows.x_t, None), None, out, None)
    with pytest.raises(TypeError, match=r"float32 or torch.bfloat16 or torch.float16, not torch.float64"):
        divergence(*ONCE, Logits(x, None, x_t, None), None, out, rows.x)
    with pytest.raises(ValueError, match=r"side by side"):
        divergence(*ONCE, Logits(x.t().contiguous().t(), None, x_t, None), None, out, None)


def test_extras_have_the_names_of_the_kernel() -> None:
    """They are passed by position."""
    from fastkl.kernels.divergence.triton import _divergence_kernel

    names = _divergence_kernel.arg_names
    first = names.index("teacher_nll_ptr")
    assert [f"{name}_ptr" for name in Extras._fields] == names[first : first + len(Extras._fields)]
