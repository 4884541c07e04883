"""The divergences as row functions: kinds, and what the tests ask of them on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from loss_cases import DIVERGENCES, PARAMETERS
from row_cases import INF, Outcome, Rows, UnderTest, poisoned, random_rows
from row_contract import WIDTH, RowContract, undefined
from torch import Tensor

from fastkl import reference
from fastkl.kernels.divergence import pytorch as divergence_pytorch
from fastkl.kernels.divergence.formula import ROWS, ROWS_WITH_EXTRAS, Divergence, HardTarget, Outputs


class Kind(NamedTuple):
    name: Divergence
    parameter: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}-{self.parameter}" if self.parameter else self.name

    def of(self, z: Tensor, z_t: Tensor) -> Tensor:
        """The definition, [n]."""
        parameter = (self.parameter,) if self.name in PARAMETERS else ()
        value: Tensor = getattr(reference, self.name)(z, z_t, *parameter)
        return value

    def values(self, z: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        """Those of a row function, [2, n]."""
        nll = z.new_zeros(len(z)) if y is None else -reference.logprobs(z.detach(), y)
        return torch.stack([self.of(z, z_t), nll])


KINDS = [
    Kind(name, {"beta": 0.5, "alpha": 0.1, "power": 0.7}[PARAMETERS[name]] if name in PARAMETERS else 0.0)
    for name in DIVERGENCES
]
# Where one of the weights of m is small, digits of it are easily lost; powers far from 1.
EXTREME = [
    Kind(name, parameter)
    for name in PARAMETERS
    for parameter in ((1e-4, 0.999) if name != "density_power" else (0.01, 5.0, 300.0))
]
UNBOUNDED = ("reverse_kl", "forward_kl")  # infinite where one side forbids what the other may emit
ONCE = KINDS[0]  # where the kind is beside the point
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
all_kinds = pytest.mark.parametrize("kind", [*KINDS, *EXTREME], ids=str)


def under_test(divergence: Callable[..., None], kind: Kind, extras: bool = False, device: str = "cpu") -> UnderTest:
    """The divergence of a backend."""
    functions = partial(divergence, *kind), partial(divergence_pytorch.divergence, *kind)
    outputs, steps = ROWS_WITH_EXTRAS if extras else ROWS, kind.name == "total_variation"
    return UnderTest(*functions, kind.values, outputs, device, 3.0, steps)


def with_hard_target(
    divergence: Callable[..., None], kind: Kind, hard: HardTarget, device: str = "cpu", extras: bool = False
) -> UnderTest:
    """The divergence of a backend beside a cross-entropy; the definition's first value is the two together."""
    tested = under_test(divergence, kind, extras, device)

    def values(z: Tensor, z_t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        nll = -reference.logprobs(hard.power * z, y)
        together, token_nll = kind.values(z, z_t, y)
        return torch.stack([together + hard.coef * nll, token_nll, nll])

    functions = (partial(function, hard=hard) for function in tested[:2])
    return UnderTest(*functions, values, tested.outputs + 1, device, tested.slack, tested.steps)


def outputs_of(outcome: Outcome) -> tuple[Outputs, dict[str, Tensor]]:
    outputs = Outputs.of(outcome.values)
    assert outputs.by_products
    return outputs, outputs.by_products


class DivergenceContract(RowContract):
    """Of the divergences on every backend; `tested` is each kind without extras, `described` each kind with them."""

    divergence: Callable[..., None]
    device = "cpu"

    @pytest.fixture(params=KINDS, ids=str)
    def kind(self, request: pytest.FixtureRequest) -> Kind:
        found: Kind = request.param
        return found

    @pytest.fixture
    def tested(self, kind: Kind) -> UnderTest:
        return under_test(self.divergence, kind, False, self.device)

    @pytest.fixture
    def described(self, kind: Kind) -> UnderTest:
        return under_test(self.divergence, kind, True, self.device)

    def test_extras_change_nothing(self, tested: UnderTest, described: UnderTest) -> None:
        rows = random_rows(2, WIDTH)
        with_extras, without = described.run(rows), tested.run(rows)
        assert torch.equal(with_extras.values[:2], without.values)
        assert torch.equal(with_extras.gradient, without.gradient)

    def test_without_tokens(self, described: UnderTest) -> None:
        rows = random_rows(2, WIDTH)
        ours, expected = described.run(rows._replace(y=None)), described.run(rows)
        (value, token_nll, *_), extras = outputs_of(ours)
        assert (token_nll == 0).all()
        assert (extras["teacher_logprobs"] == 0).all()
        assert torch.equal(value, expected.values[0])
        assert torch.equal(ours.gradient, expected.gradient)

    @undefined
    @pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
    def test_extras_of_what_is_undefined(self, described: UnderTest, side: int, poison: str) -> None:
        """On either side, and in its row alone."""
        ours = described.run(poisoned(random_rows(2, WIDTH), poison, side))
        (value, *_), extras = outputs_of(ours)
        own = extras["teacher_entropy"] if side else extras["student_entropy"]
        for t in (value, own, extras["reverse_kl"], extras["forward_kl"], extras["top1_agreement"]):
            assert t.isnan().tolist() == [False, True]
        assert ours.gradient.isnan().any(1).tolist() == ours.gradient.isnan().all(1).tolist() == [False, True]

    def test_extras_of_a_student_like_its_teacher(self, described: UnderTest) -> None:
        rows = random_rows(2, WIDTH)
        _, extras = outputs_of(described.run(rows._replace(x_t=rows.x)))
        assert (extras["reverse_kl"] == 0).all()
        assert (extras["forward_kl"] == 0).all()
        assert torch.equal(extras["student_entropy"], extras["teacher_entropy"])
        assert (extras["top1_agreement"] == 1).all()


def assert_zero_for_equals(
    tested: UnderTest, n: int, width: int, spread: float, dtype: torch.dtype, capped: bool
) -> None:
    """A student like its teacher, with forbidden tokens: exactly 0, value and gradient, not nearly."""
    rows = random_rows(n, width, spread)
    x = rows.x.index_fill(1, torch.tensor([0, 77]), -INF)
    ours = tested.run(Rows(x, x, rows.y, (3.0, 3.0) if capped else (None, None)), dtype)
    assert (ours.values[0] == 0).all()
    assert (ours.gradient == 0).all()


def agreements(width: int, block: int) -> tuple[Rows, list[float]]:
    """Is the first maximum of the student that of the teacher?

    Ties within a block, across blocks, and a maximum below 0 in a row that begins with forbidden tokens.
    """
    x, x_t = torch.zeros(5, width), torch.zeros(5, width)
    x[0, [7, 9, width - 1]] = 3.0
    x_t[0, [7, width - 2]] = 5.0
    x[1, [7, width - 1]] = 3.0
    x_t[1, width - 1] = 3.0
    x[2:], x_t[2:] = -9.0, -8.0
    x[2, : block + 1] = x_t[2, : block + 1] = -INF
    x[3, 0] = x_t[3, 1] = -INF
    return Rows(x, x_t), [1.0, 0.0, 1.0, 0.0, 1.0]
