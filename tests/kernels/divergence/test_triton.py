"""The divergences in Triton against float64, as accurate as those in PyTorch, and with the same rules at the edges.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from devices import triton_device
from divergence_cases import (
    EXTREME,
    KINDS,
    ONCE,
    DivergenceContract,
    Kind,
    agreements,
    assert_zero_for_equals,
    kinds,
    outputs_of,
    under_test,
    with_hard_target,
)
from row_cases import INF, LOWEST, Caps, Rows, UnderTest, close_rows, edges, ramp, random_rows
from row_contract import WIDTH, TritonContract, assert_far_apart_rows_are_right, outside

from fastkl.kernels.divergence.formula import HardTarget
from fastkl.kernels.divergence.triton import divergence
from fastkl.kernels.rows.launch import row_config

DEVICE = triton_device()
# A chunk of bf16 is stored as such: rounded to 8 bits on a GPU, cut off after them by the interpreter.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPS: dict[str, Caps] = {
    "capped": (2.5, 2.5),
    "student-capped": (30.0, None),
    "teacher-capped": (None, 4.0),
}
BLOCK = row_config(2).block_n
WIDE = BLOCK + 3
EDGES = edges(WIDE, BLOCK)
slow = pytest.mark.slow


class TestDivergence(DivergenceContract, TritonContract):
    divergence, device, wide = staticmethod(divergence), DEVICE, WIDE


def subject(kind: Kind, extras: bool | None = None) -> UnderTest:
    """With extras for one of the kinds, unless told."""
    return under_test(divergence, kind, kind == ONCE if extras is None else extras, DEVICE)


# 7 and 1009: primes. 50257: odd, many blocks.
WIDTHS = [(1, "fp32"), (7, "bf16"), (1009, "fp32"), (BLOCK, "fp32"), (BLOCK + 1, "bf16")]
MORE_WIDTHS = [(width, dtype) for width in (2, BLOCK - 1, 2 * BLOCK + 17, 50257) for dtype in DTYPES]


@pytest.mark.parametrize(("vocabulary", "dtype"), [*WIDTHS, *[pytest.param(*w, marks=slow) for w in MORE_WIDTHS]])
@kinds
def test_widths(kind: Kind, vocabulary: int, dtype: str) -> None:
    subject(kind).assert_right(random_rows(2, vocabulary), DTYPES[dtype])


@pytest.mark.parametrize("power", [1.0, 2.5])
@kinds
def test_hard_targets(kind: Kind, power: float) -> None:
    """The gradient has both parts in it; the divergence's values are what they are without."""
    tested, rows = with_hard_target(divergence, kind, HardTarget(0.7, power), DEVICE), random_rows(2, WIDE)
    ours = tested.assert_right(rows)
    assert torch.equal(ours.values[:2], subject(kind, extras=False).run(rows).values)
    tested.assert_right(rows._replace(caps=(2.5, 3.5)))


@pytest.mark.parametrize("case", EDGES)
def test_hard_targets_at_the_edges(case: str) -> None:
    with_hard_target(divergence, ONCE, HardTarget(0.7, 0.5), DEVICE).assert_right(EDGES[case])


def test_a_hard_target_outside_the_vocabulary_is_nan() -> None:
    tested = with_hard_target(divergence, ONCE, HardTarget(0.7, 0.5), DEVICE)
    values, gradient = tested.run(random_rows(2, 50)._replace(y=torch.tensor([3, 50])))
    assert values[2].isnan().tolist() == [False, True]
    assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize("kind", EXTREME, ids=str)
def test_parameters_near_their_ends(kind: Kind) -> None:
    subject(kind).assert_right(random_rows(1, WIDE))


@kinds
def test_small_divergences(kind: Kind) -> None:
    subject(kind).assert_right(close_rows(1, WIDE))


MORE_CAPS = [(c, d) for c in CAPS for d in DTYPES if (c, d) != ("capped", "fp32")]


@pytest.mark.parametrize(("caps", "dtype"), [("capped", "fp32"), *[pytest.param(*c, marks=slow) for c in MORE_CAPS]])
@kinds
def test_soft_caps(kind: Kind, caps: str, dtype: str) -> None:
    """Scores from those that tanh leaves alone to those that it saturates."""
    scale = torch.tensor([1e-3, 0.25, 4.0, 50.0])[:, None]
    subject(kind).assert_right(random_rows(4, WIDE).scaled(scale)._replace(caps=CAPS[caps]), DTYPES[dtype])


@pytest.mark.parametrize("caps", [CAPS["student-capped"], CAPS["teacher-capped"]], ids=str)
def test_each_side_has_its_own_cap(caps: Caps) -> None:
    for kind in (ONCE, Kind("jsd", 0.5)):
        subject(kind, extras=True).assert_right(random_rows(1, WIDTH)._replace(caps=caps))


@pytest.mark.parametrize("case", EDGES)
def test_edges(case: str) -> None:
    """Both KLs, one among the extras of the other, and two of the kinds that are always finite."""
    subject(Kind("forward_kl"), extras=True).assert_right(EDGES[case])
    subject(ONCE, extras=False).assert_right(EDGES[case])
    for kind in (Kind("jsd", 0.5), Kind("skewed_forward_kl", 0.1)):
        values, gradient = subject(kind).assert_right(EDGES[case])
        assert values[0].isfinite().all()
        assert gradient.isfinite().all()


@slow
@pytest.mark.parametrize("case", EDGES)
def test_edges_from_both_sides_and_with_any_parameter(case: str) -> None:
    for rows in (EDGES[case], EDGES[case].swapped()):
        for kind in (*KINDS, *EXTREME):
            subject(kind, extras=True).assert_right(rows)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name != "forward_kl"], ids=str)
def test_a_student_at_the_lowest_number(kind: Kind) -> None:
    """In the second block, without being forbidden; the forward KL of that exceeds float32."""
    row = ramp(WIDE)[None]
    values, gradient = subject(kind, extras=False).assert_right(
        Rows(row.where(torch.arange(WIDE) < BLOCK, LOWEST), row)
    )
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("column", [0, WIDE - 1])
def test_a_probability_that_underflows_is_impossible(column: int) -> None:
    """e⁻²⁰⁰ is 0 in float32, whether the peak of the row comes before it or after: nothing makes that infinite."""
    x = torch.zeros(1, WIDE)
    x[0, column] = 200.0
    rows = Rows(x, x.index_fill(1, torch.tensor(3), -INF))
    for kind in KINDS:
        values, gradient = subject(kind).run(rows.swapped() if kind.name == "forward_kl" else rows)
        assert (values[0] == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("steps", [(LOWEST, LOWEST, 0.0), (0.0, 80.0, 160.0)], ids=["at once", "by and by"])
def test_what_has_underflowed_leaves_no_trace(steps: tuple[float, float, float]) -> None:
    """Three blocks; the first is forbidden on one side, and lost beside the third on the other."""
    x = torch.tensor(steps).repeat_interleave(BLOCK)[None]
    x_t = ramp(3 * BLOCK).index_fill(0, torch.arange(BLOCK), -INF)[None]
    for rows, name in ((Rows(x, x_t), "reverse_kl"), (Rows(x_t, x), "forward_kl")):
        tested = subject(Kind(name), extras=False)  # type: ignore[arg-type]
        ours, peer = tested.run(rows), tested.run_peer(rows)
        torch.testing.assert_close(ours.values[0], peer.values[0])
        torch.testing.assert_close(ours.gradient, peer.gradient, rtol=1e-5, atol=1e-7)


EQUALS = [(2.0, "fp32", False), (1e4, "fp32", True), (1e4, "bf16", False), (2.0, "bf16", True)]


@pytest.mark.parametrize(("spread", "dtype", "capped"), EQUALS)
@pytest.mark.parametrize("kind", [*KINDS, *[pytest.param(k, marks=slow) for k in EXTREME]], ids=str)
def test_a_student_like_its_teacher(kind: Kind, spread: float, dtype: str, capped: bool) -> None:
    assert_zero_for_equals(subject(kind, extras=False), 1, WIDE, spread, DTYPES[dtype], capped)


@pytest.mark.parametrize("column", [3, WIDE - 1])
def test_a_token_that_one_side_forbids(column: int) -> None:
    """The KL from the other side is +inf, of which the other rows of the chunk do not notice."""
    row = ramp(WIDE).repeat(3, 1)
    clean = Rows(row, row + 1.0)
    dirty = Rows(clean.x.clone(), clean.x_t.clone())
    dirty.x_t[1, column] = -INF
    for rows, swapped, name in ((dirty, clean, "reverse_kl"), (dirty.swapped(), clean.swapped(), "forward_kl")):
        tested = subject(Kind(name), extras=False)  # type: ignore[arg-type]
        ours, expected = tested.run(rows), tested.run(swapped)
        assert ours.values[0, 1] == INF
        assert not ours.gradient[1].isfinite().any() or name == "forward_kl"
        assert torch.equal(ours.values[:, [0, 2]], expected.values[:, [0, 2]])
        assert torch.equal(ours.gradient[[0, 2]], expected.gradient[[0, 2]])


@pytest.mark.parametrize("y", outside(WIDTH))
def test_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    """Nothing is read there, nothing is written, and a wrong id cannot pass unseen."""
    ours = subject(ONCE).run(random_rows(2, WIDTH)._replace(y=torch.tensor([5, y])))
    (value, token_nll, *_), extras = outputs_of(ours)
    assert token_nll.isnan().tolist() == extras["teacher_logprobs"].isnan().tolist() == [False, True]
    assert value.isfinite().all()
    assert ours.gradient.isfinite().all()


def test_agreement_is_of_the_first_maximum() -> None:
    rows, expected = agreements(WIDE, BLOCK)
    assert outputs_of(subject(ONCE).run(rows))[1]["top1_agreement"].tolist() == expected


def test_offsets_beyond_int32(tmp_path: Path) -> None:
    for kind in (Kind("forward_kl"), Kind("jsd", 0.5)):
        assert_far_apart_rows_are_right(subject(kind), tmp_path)


def test_no_token_in_common() -> None:
    """The largest value that the bounded have; the others are among the edges."""
    for kind in (Kind("total_variation"), Kind("skewed_reverse_kl", 1e-4)):
        subject(kind).assert_right(EDGES["no token in common"])
