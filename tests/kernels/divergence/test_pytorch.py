"""The divergences in PyTorch against their definitions, at the edges, and what must hold for any data."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import (
    EXTREME,
    INF,
    KINDS,
    Kind,
    Outcome,
    Rows,
    assert_accurate,
    close_rows,
    edges,
    random_rows,
    run,
)
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import assert_as_accurate, largest
from property_settings import PROPERTY
from torch import Tensor

from fastkl import reference
from fastkl.kernels.divergence.formula import Extras, Outputs
from fastkl.kernels.divergence.pytorch import divergence
from fastkl.kernels.rows import pytorch as rows_torch
from fastkl.kernels.rows.interface import Logits

CAPS: dict[str, tuple[float | None, float | None]] = {
    "plain": (None, None),
    "capped": (2.5, 2.5),
    "student-capped": (30.0, None),
    "teacher-capped": (None, 4.0),
}
EDGES = edges(block=61)
FLOAT64 = torch.float64
SEEDS = st.integers(0, 2**31)


def run_ours(kind: Kind, rows: Rows, dtype: torch.dtype = FLOAT64, gradient: bool = True) -> Outcome:
    return run(divergence, kind, rows, dtype, gradient=gradient, extras=True)


def by_autograd(kind: Kind, rows: Rows, dtype: torch.dtype = FLOAT64) -> Outcome:
    """Value and gradient of the definition."""
    rows = rows.to(dtype)
    x = rows.x.requires_grad_()
    z, z_t = rows._replace(x=x).logits()
    value = kind.of(z, z_t)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return Outcome(value.detach(), gradient)


def assert_defined(kind: Kind, rows: Rows) -> None:
    ours, true = run_ours(kind, rows), by_autograd(kind, rows)
    torch.testing.assert_close(ours.values[0], true.values, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.gradient, true.gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("caps", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 101])
@pytest.mark.parametrize("kind", [*KINDS, *EXTREME], ids=str)
def test_definition(kind: Kind, vocabulary: int, caps: tuple[float | None, float | None]) -> None:
    rows = random_rows(5, vocabulary)
    scale = torch.tensor([0.05, 0.5, 1.0, 2.0, 20.0])[:, None]
    assert_defined(kind, rows._replace(x=rows.x * scale, x_t=rows.x_t * scale, caps=caps))


@pytest.mark.parametrize("forbidden", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name not in ("reverse_kl", "forward_kl")], ids=str)
def test_definition_with_forbidden_tokens(kind: Kind, forbidden: str) -> None:
    """Both sides finite: the definition's gradient by autograd has no NaN to hide."""
    rows = random_rows(3, 11)
    for x in {"student": [rows.x], "teacher": [rows.x_t], "both": [rows.x, rows.x_t]}[forbidden]:
        x[:, [0, 4]] = -INF
    assert_defined(kind, rows)


def test_forward_kl_with_forbidden_tokens() -> None:
    """Infinite where the teacher wants what the student forbids, and the gradient is p − q all the same."""
    rows = random_rows(3, 11)
    rows.x_t[:, [0, 4]] = -INF
    assert_defined(Kind("forward_kl"), rows)
    rows.x[:, 4] = -INF
    assert_defined(Kind("forward_kl"), rows)
    rows.x[1, 5] = -INF
    ours = run_ours(Kind("forward_kl"), rows)
    assert (ours.values[0] == INF).tolist() == [False, True, False]
    p, q = torch.softmax(rows.x.double(), -1), torch.softmax(rows.x_t.double(), -1)
    torch.testing.assert_close(ours.gradient, p - q, rtol=1e-10, atol=1e-13)


def test_reverse_kl_with_forbidden_tokens() -> None:
    """What the student forbids is as good as not there."""
    rows = random_rows(3, 11)
    whole = run_ours(Kind("reverse_kl"), rows._replace(x=rows.x.index_fill(1, torch.tensor([0, 4]), -2e3)))
    rows.x[:, [0, 4]] = -INF
    ours = run_ours(Kind("reverse_kl"), rows)
    torch.testing.assert_close(ours.values[0], whole.values[0])
    torch.testing.assert_close(ours.gradient, whole.gradient)
    rows.x_t[:, 4] = -INF
    assert run_ours(Kind("reverse_kl"), rows).values[0].isfinite().all()
    rows.x_t[1, 5] = -INF
    assert (run_ours(Kind("reverse_kl"), rows).values[0] == INF).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", [Kind("reverse_kl"), Kind("jsd", 0.5)], ids=str)
def test_extras(kind: Kind) -> None:
    rows = random_rows(6, 23, spread=3.0)
    rows.x_t[::2] = rows.x[::2] * 0.5
    (value, token_nll, _), extras = run_ours(kind, rows).outputs()
    z, z_t = rows.to(FLOAT64).logits()
    assert rows.y is not None
    expected = Extras(
        -reference.logprobs(z_t, rows.y),
        reference.entropy(z),
        reference.entropy(z_t),
        reference.reverse_kl(z, z_t),
        reference.forward_kl(z, z_t),
        (z.argmax(-1) == z_t.argmax(-1)).double(),
    )
    torch.testing.assert_close(value, kind.of(z, z_t))
    torch.testing.assert_close(token_nll, -reference.logprobs(z, rows.y))
    assert set(expected.agreement.tolist()) == {0.0, 1.0}
    for got, true in zip(extras, expected, strict=True):
        torch.testing.assert_close(got, true)


def test_agreement_is_of_the_first_maximum() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 0.0], [1.0, 3.0, 3.0, 0.0], [-INF, 2.0, 1.0, 1.0]])
    x_t = torch.tensor([[0.0, 5.0, 1.0, 5.0], [0.0, 4.0, 5.0, 5.0], [9.0, 2.0, 1.0, 1.0]])
    assert run_ours(KINDS[0], Rows(x, x_t)).outputs()[1].agreement.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_extras_change_nothing(kind: Kind) -> None:
    rows = random_rows(4, 23)
    with_extras, without = run_ours(kind, rows), run(divergence, kind, rows, FLOAT64)
    assert torch.equal(with_extras.values[:2], without.values)
    assert torch.equal(with_extras.gradient, without.gradient)


def test_no_tokens() -> None:
    (value, token_nll, _), extras = run_ours(KINDS[0], random_rows(4, 23)._replace(y=None)).outputs()
    assert (token_nll == 0).all()
    assert (extras.teacher_nll == 0).all()
    assert torch.equal(value, extras.reverse_kl)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str, swapped: bool) -> None:
    """float32 where float64 is, and finite where the maths is."""
    rows = EDGES[case].swapped() if swapped else EDGES[case]
    for kind in (*KINDS, *EXTREME):
        ours, exact = (run_ours(kind, rows, dtype) for dtype in (torch.float32, FLOAT64))
        assert_accurate(str(kind), ours, ours, exact, rows, steps=kind.name == "total_variation")
        value = ours.values[0]
        assert (value >= -1e-6).all()
        if kind.name not in ("reverse_kl", "forward_kl"):
            assert value.isfinite().all()
        if kind.name != "reverse_kl" or value.isfinite().all():
            assert ours.gradient.isfinite().all()
            assert (ours.gradient[rows.x == -INF] == 0).all() or kind.name == "forward_kl"


@pytest.mark.parametrize("kind", [*KINDS, *EXTREME], ids=str)
@pytest.mark.parametrize("spread", [2.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_a_student_like_its_teacher(kind: Kind, spread: float, dtype: torch.dtype) -> None:
    """Exactly 0, value and gradient, not nearly."""
    rows = random_rows(4, 1009, spread)
    x = rows.x.index_fill(1, torch.tensor([0, 77]), -INF)
    ours = run_ours(kind, Rows(x, x, rows.y, (3.0, 3.0) if spread == 2.0 else (None, None)), dtype)
    assert (ours.values[0] == 0).all()
    assert (ours.gradient == 0).all()


@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_undefined_is_nan(kind: Kind, poison: str) -> None:
    """On either side, and in its row alone."""
    for side in (0, 1):
        rows = random_rows(3, 20)
        row = (rows.x, rows.x_t)[side][1]
        row.fill_(-INF) if poison == "all -inf" else row.index_fill_(0, torch.tensor(7), float(poison))
        ours = run_ours(kind, rows, torch.float32)
        (value, _, _), extras = ours.outputs()
        for t in (value, extras.reverse_kl, extras.forward_kl, extras.agreement):
            assert t.isnan().tolist() == [False, True, False]
        assert ours.gradient.isnan().any(1).tolist() == ours.gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 rows, the last one shorter; a forbidden token in one of them."""
    rows = random_rows(5, 31)
    rows.x[3, 4] = -INF
    whole = run_ours(kind, rows)
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 2 * 31 * 8)
    ours = run_ours(kind, rows)
    assert torch.equal(ours.values, whole.values)
    assert torch.equal(ours.gradient, whole.gradient)


@pytest.mark.parametrize("apart", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradient_apart(kind: Kind, apart: torch.dtype) -> None:
    rows = random_rows(3, 31)._replace(caps=(3.0, 3.0))
    expected = run_ours(kind, rows, torch.float32)
    ours = run(divergence, kind, rows, torch.float32, apart=apart, extras=True)
    assert torch.equal(ours.values, expected.values)
    assert torch.equal(ours.gradient, expected.gradient.to(apart))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_gradient(kind: Kind) -> None:
    rows = random_rows(3, 31)
    assert torch.equal(run_ours(kind, rows, gradient=False).values, run_ours(kind, rows).values)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_rows(kind: Kind) -> None:
    values, gradient = run_ours(kind, random_rows(0, 12))
    assert (values.shape[1], gradient.shape) == (0, (0, 12))


@pytest.mark.parametrize("close", [False, True], ids=["apart", "close"])
@pytest.mark.parametrize("kind", [*KINDS, *EXTREME], ids=str)
def test_as_accurate_as_the_definition_in_float32(kind: Kind, close: bool) -> None:
    """Beside the error of the peer: one rounding of a value of size 1, and of the largest entry of the gradient."""
    rows = close_rows(8, 1009) if close else random_rows(8, 1009)
    ours = run_ours(kind, rows, torch.float32)
    peer, exact = (by_autograd(kind, rows, dtype) for dtype in (torch.float32, FLOAT64))
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate("value", ours.values[0], peer.values, exact.values, eps)
    if not (close and kind.name == "total_variation"):  # which jumps where p = q
        size = largest(exact.gradient)
        assert_as_accurate("gradient", ours.gradient, peer.gradient, exact.gradient, eps * size)


def hypothetical(seed: int, spread: float, distance: float) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 13, generator=g, dtype=FLOAT64) * spread
    return Rows(x, x + torch.randn(7, 13, generator=g, dtype=FLOAT64) * distance)


SPREADS = st.sampled_from([0.01, 1.0, 30.0])
PARAMETERS = st.floats(1e-3, 0.999)
NAMES = st.sampled_from([k.name for k in KINDS])


@PROPERTY
@given(SEEDS, NAMES, PARAMETERS, SPREADS, SPREADS)
def test_signs_sums_and_bounds(seed: int, name: str, parameter: float, spread: float, distance: float) -> None:
    kind = Kind(name, parameter)  # type: ignore[arg-type]
    ours = run_ours(kind, hypothetical(seed, spread, distance))
    value = ours.values[0]
    assert (value >= -1e-14).all()
    assert float(ours.gradient.sum(-1).abs().max()) < 1e-11 * max(1.0, float(value.max()))
    bounds = {
        "total_variation": 1.0,
        "jsd": -parameter * math.log(parameter) - (1 - parameter) * math.log1p(-parameter),
        "skewed_forward_kl": -math.log(parameter),
        "skewed_reverse_kl": -math.log(parameter),
    }
    assert (value <= bounds.get(name, INF) + 1e-13).all()


@PROPERTY
@given(SEEDS, st.sampled_from([Kind("jsd", 0.5), Kind("total_variation")]), SPREADS, SPREADS)
def test_symmetry(seed: int, kind: Kind, spread: float, distance: float) -> None:
    rows = hypothetical(seed, spread, distance)
    there, back = run_ours(kind, rows), run_ours(kind, rows.swapped())
    torch.testing.assert_close(there.values[0], back.values[0], rtol=1e-10, atol=1e-14)


@PROPERTY
@given(SEEDS, PARAMETERS, SPREADS)
def test_mirror_images(seed: int, parameter: float, spread: float) -> None:
    """The reverse kind is the forward kind with the sides exchanged; so is jsd with 1 − β."""
    rows = hypothetical(seed, spread, 1.0)
    mirrored = [
        (Kind("reverse_kl"), Kind("forward_kl")),
        (Kind("skewed_reverse_kl", parameter), Kind("skewed_forward_kl", parameter)),
        (Kind("jsd", parameter), Kind("jsd", 1.0 - parameter)),
    ]
    for one, other in mirrored:
        there, back = run_ours(one, rows), run_ours(other, rows.swapped())
        torch.testing.assert_close(there.values[0], back.values[0], rtol=1e-9, atol=1e-13)


@PROPERTY
@given(SEEDS, NAMES, PARAMETERS, st.floats(-50.0, 50.0), st.floats(-50.0, 50.0))
def test_a_shift_of_all_logits_is_not_seen(seed: int, name: str, parameter: float, up: float, up_t: float) -> None:
    kind = Kind(name, parameter)  # type: ignore[arg-type]
    rows = hypothetical(seed, 2.0, 1.0)
    here, there = run_ours(kind, rows), run_ours(kind, rows._replace(x=rows.x + up, x_t=rows.x_t + up_t))
    torch.testing.assert_close(there.values[0], here.values[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(there.gradient, here.gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_near_its_ends(end: float, limit: str) -> None:
    """value / β → KL(q‖p) as β → 0, value / (1 − β) → KL(p‖q) as β → 1, and gradients alike."""
    rows, small = random_rows(4, 31, spread=1.0), 1e-7
    near = run_ours(Kind("jsd", abs(end - small)), rows)
    at = run_ours(Kind(limit), rows)  # type: ignore[arg-type]
    torch.testing.assert_close(near.values[0] / small, at.values[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(near.gradient / small, at.gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_no_skew_is_the_plain_divergence(name: str) -> None:
    rows = random_rows(4, 31)
    rows.x[0, 3] = rows.x_t[1, 4] = -INF
    skewed, plain = run_ours(Kind(f"skewed_{name}", 0.0), rows), run_ours(Kind(name), rows)  # type: ignore[arg-type]
    for one, other in zip(skewed, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def test_outputs_name_the_rows() -> None:
    out = torch.arange(8.0)[:, None]
    names = [*Outputs._fields[:-1], *Extras._fields]
    value, token_nll, extras = Outputs.of(out)
    assert extras is not None
    assert [float(t) for t in (value, token_nll, *extras)] == list(range(8))
    assert names[0] == "value"
    assert names[-1] == "agreement"
    assert Outputs.of(out[:2]).extras is None


def chunk_of(rows: Rows) -> Logits:
    return Logits(rows.x.clone(), None, rows.x_t.clone(), None)


def test_out_may_have_gaps() -> None:
    rows = random_rows(3, 12).to(FLOAT64)
    buffer: Tensor = torch.full((6, 9), 7.0, dtype=FLOAT64)
    divergence(*KINDS[0], chunk_of(rows), rows.y, buffer.t()[:8, ::2], None)
    assert torch.equal(buffer.t()[:8, ::2], run_ours(KINDS[0], rows).values)
    assert int((buffer == 7.0).sum()) == buffer.numel() - 24
