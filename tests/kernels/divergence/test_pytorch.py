"""The divergences in PyTorch against their definitions, at the edges, and what must hold for any data."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_as_accurate, largest
from divergence_cases import (
    EXTREME,
    KINDS,
    ONCE,
    UNBOUNDED,
    DivergenceContract,
    Kind,
    agreements,
    all_kinds,
    assert_zero_for_equals,
    kinds,
    outputs_of,
    under_test,
    with_hard_target,
)
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import DIVERGENCES, PARAMETERS
from property_settings import PROPERTY
from row_cases import INF, Caps, Outcome, Rows, UnderTest, assert_accurate, close_rows, edges, random_rows

from fastkl.kernels.divergence.formula import HardTarget, Outputs, PerToken
from fastkl.kernels.divergence.pytorch import divergence
from fastkl.kernels.rows.parallel import vocabulary

CAPS: dict[str, Caps] = {
    "plain": (None, None),
    "capped": (2.5, 2.5),
    "student-capped": (30.0, None),
    "teacher-capped": (None, 4.0),
}
EDGES = edges(64, 61)
FLOAT64 = torch.float64


class TestDivergence(DivergenceContract):
    divergence = staticmethod(divergence)


def subject(kind: Kind) -> UnderTest:
    return under_test(divergence, kind, extras=True)


def run_ours(kind: Kind, rows: Rows, dtype: torch.dtype = FLOAT64) -> Outcome:
    return subject(kind).run(rows, dtype)


def assert_defined(kind: Kind, rows: Rows) -> None:
    ours, true = run_ours(kind, rows), subject(kind).defined(rows)
    torch.testing.assert_close(ours.values[0], true.values[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours.gradient, true.gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("caps", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 101])
@all_kinds
def test_definition(kind: Kind, vocabulary: int, caps: Caps) -> None:
    scale = torch.tensor([0.05, 0.5, 1.0, 2.0, 20.0])[:, None]
    assert_defined(kind, random_rows(5, vocabulary).scaled(scale)._replace(caps=caps))


@pytest.mark.parametrize("forbidden", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.name not in UNBOUNDED], ids=str)
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


def test_agreement_is_of_the_first_maximum() -> None:
    rows, expected = agreements(40, 20)
    assert outputs_of(run_ours(ONCE, rows))[1]["top1_agreement"].tolist() == expected


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str, swapped: bool) -> None:
    """float32 where float64 is, and finite where the maths is."""
    rows = EDGES[case].swapped() if swapped else EDGES[case]
    for kind in (*KINDS, *EXTREME):
        ours, exact = (run_ours(kind, rows, dtype) for dtype in (torch.float32, FLOAT64))
        assert_accurate(subject(kind), ours, ours, exact, rows)
        value = ours.values[0]
        assert (value >= -1e-6).all()
        if kind.name not in UNBOUNDED:
            assert value.isfinite().all()
        if kind.name != "reverse_kl" or value.isfinite().all():
            assert ours.gradient.isfinite().all()
            assert (ours.gradient[rows.x == -INF] == 0).all() or kind.name == "forward_kl"


@all_kinds
@pytest.mark.parametrize("spread", [2.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_a_student_like_its_teacher(kind: Kind, spread: float, dtype: torch.dtype) -> None:
    assert_zero_for_equals(subject(kind), 4, 1009, spread, dtype, capped=spread == 2.0)


@kinds
def test_blocks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2 rows, the last one shorter; a forbidden token in one of them."""
    rows = random_rows(5, 31)
    rows.x[3, 4] = -INF
    whole = run_ours(kind, rows)
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", 2 * 31 * 8)
    ours = run_ours(kind, rows)
    assert torch.equal(ours.values, whole.values)
    assert torch.equal(ours.gradient, whole.gradient)


@pytest.mark.parametrize("close", [False, True], ids=["apart", "close"])
@all_kinds
def test_as_accurate_as_the_definition_in_float32(kind: Kind, close: bool) -> None:
    """Beside the error of the peer: one rounding of a value of size 1, and of the largest entry of the gradient."""
    rows = close_rows(8, 1009) if close else random_rows(8, 1009)
    ours = run_ours(kind, rows, torch.float32)
    peer, exact = (subject(kind).defined(rows, dtype) for dtype in (torch.float32, FLOAT64))
    eps = torch.finfo(torch.float32).eps
    assert_as_accurate("value", ours.values[0], peer.values[0], exact.values[0], eps)
    if not (close and subject(kind).steps):
        size = largest(exact.gradient)
        assert_as_accurate("gradient", ours.gradient, peer.gradient, exact.gradient, eps * size)


def hypothetical(seed: int, spread: float, distance: float) -> Rows:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 13, generator=g, dtype=FLOAT64) * spread
    return Rows(x, x + torch.randn(7, 13, generator=g, dtype=FLOAT64) * distance)


SEEDS = st.integers(0, 2**31)
SPREADS = st.sampled_from([0.01, 1.0, 30.0])
ANY_KIND = st.builds(Kind, st.sampled_from(DIVERGENCES), st.floats(1e-3, 0.999)) | st.builds(
    Kind, st.just("density_power"), st.floats(1e-3, 1000.0)
)


BOUNDS: dict[str, Callable[[float], float]] = {  # of a parameter
    "total_variation": lambda _: 1.0,
    "jsd": lambda beta: -beta * math.log(beta) - (1 - beta) * math.log1p(-beta),
    "skewed_forward_kl": lambda alpha: -math.log(alpha),
    "skewed_reverse_kl": lambda alpha: -math.log(alpha),
    "density_power": lambda power: 1.0 / power,
}


@PROPERTY
@given(SEEDS, ANY_KIND, SPREADS, SPREADS)
def test_signs_sums_and_bounds(seed: int, kind: Kind, spread: float, distance: float) -> None:
    ours, parameter = run_ours(kind, hypothetical(seed, spread, distance)), kind.parameter
    value = ours.values[0]
    assert (value >= -1e-14).all()
    assert float(ours.gradient.sum(-1).abs().max()) < 1e-11 * max(1.0, float(value.max()))
    bound = BOUNDS.get(kind.name, lambda _: INF)(parameter)
    assert (value <= bound + 1e-13).all()


@PROPERTY
@given(SEEDS, st.floats(1e-3, 0.999), SPREADS, SPREADS)
def test_mirror_images(seed: int, parameter: float, spread: float, distance: float) -> None:
    """The reverse kind is the forward kind with the sides exchanged; so is jsd with 1 − β. Two are their own image."""
    rows = hypothetical(seed, spread, distance)
    mirrored = [
        (Kind("reverse_kl"), Kind("forward_kl")),
        (Kind("skewed_reverse_kl", parameter), Kind("skewed_forward_kl", parameter)),
        (Kind("jsd", parameter), Kind("jsd", 1.0 - parameter)),
        (Kind("jsd", 0.5), Kind("jsd", 0.5)),
        (Kind("total_variation"), Kind("total_variation")),
    ]
    for one, other in mirrored:
        there, back = run_ours(one, rows), run_ours(other, rows.swapped())
        torch.testing.assert_close(there.values[0], back.values[0], rtol=1e-9, atol=1e-13)


@PROPERTY
@given(SEEDS, ANY_KIND, st.floats(-50.0, 50.0), st.floats(-50.0, 50.0))
def test_a_shift_of_all_logits_is_not_seen(seed: int, kind: Kind, up: float, up_t: float) -> None:
    rows = hypothetical(seed, 2.0, 1.0)
    here, there = run_ours(kind, rows), run_ours(kind, rows._replace(x=rows.x + up, x_t=rows.x_t + up_t))
    torch.testing.assert_close(there.values[0], here.values[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(there.gradient, here.gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [Kind(name, 0.0) for name in PARAMETERS if name.startswith("skewed")], ids=str)
def test_no_skew_is_the_plain_divergence(kind: Kind) -> None:
    rows = random_rows(4, 31)
    rows.x[0, 3] = rows.x_t[1, 4] = -INF
    plain = Kind(kind.name.removeprefix("skewed_"))  # type: ignore[arg-type]
    torch.testing.assert_close(
        tuple(run_ours(kind, rows)), tuple(run_ours(plain, rows)), rtol=0.0, atol=0.0, equal_nan=True
    )


def test_outputs_name_the_rows() -> None:
    out = torch.arange(8.0)[:, None]
    value, token_nll, by_products, hard_nll = Outputs.of(out)
    assert hard_nll is None
    assert Outputs.of(out[:3]).hard_nll is not None
    assert not Outputs.of(out[:3]).by_products
    assert [float(t) for t in (value, token_nll, *by_products.values())] == list(range(8))
    assert list(by_products) == list(PerToken._fields[1:])
    assert not Outputs.of(out[:2]).by_products


@pytest.mark.parametrize("extras", [False, True], ids=["", "extras"])
@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("power", [1.0, 0.4, 2.5])
@kinds
def test_hard_targets(kind: Kind, power: float, cap: float | None, extras: bool) -> None:
    """The gradient is that of the divergence and of coef · (−log softmax(power · z)[y]) together."""
    hard, rows = HardTarget(0.7, power), random_rows(5, 40)._replace(caps=(cap, None))
    tested = with_hard_target(divergence, kind, hard, extras=extras)
    ours, exact = tested.run(rows, torch.float64), tested.defined(rows)
    (value, token_nll, by_products, hard_nll), plain = Outputs.of(ours.values), under_test(divergence, kind, extras)
    together, *others = exact.values
    assert hard_nll is not None
    torch.testing.assert_close(
        torch.stack([value + hard.coef * hard_nll, token_nll, hard_nll]), torch.stack([together, *others])
    )
    torch.testing.assert_close(ours.gradient, exact.gradient, rtol=1e-10, atol=1e-13)
    assert bool(by_products) == extras
    torch.testing.assert_close(ours.values[:-1], plain.run(rows, torch.float64).values)
