"""The cross-entropy in PyTorch, which the kernel in Triton is measured against: definition, and edges."""

from __future__ import annotations

import pytest
import torch
from cross_entropy_cases import BEYOND, IDS, OPTIONS, class_weights, under_test
from row_cases import INF, UnderTest, edges, random_rows
from row_contract import RowContract

from fastkl.kernels.rows.cross_entropy import pytorch

EDGES = edges(64, 61)
each_option = pytest.mark.parametrize("options", OPTIONS)
weighted = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])


@pytest.fixture
def tested() -> UnderTest:
    return under_test(pytorch, OPTIONS["both"], weighted=True)


class TestCrossEntropy(RowContract):
    @each_option
    @weighted
    @pytest.mark.parametrize("cap", [None, 2.5])
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 1009])
    def test_definition(self, vocabulary: int, cap: float | None, options: str, weighted: bool) -> None:
        tested = under_test(pytorch, OPTIONS[options], weighted, ids=True)
        rows = random_rows(5, vocabulary)._replace(caps=(cap, None))
        ours, exact = tested.run(rows, torch.float64), tested.defined(rows)
        torch.testing.assert_close(tuple(ours), tuple(exact), rtol=1e-10, atol=1e-13)

    @each_option
    @weighted
    @pytest.mark.parametrize("case", EDGES)
    def test_edges(self, case: str, options: str, weighted: bool) -> None:
        """float32 where float64 is; but for a sum of the lowest numbers, which float32 has not."""
        if case == BEYOND and OPTIONS[options].label_smoothing:
            return
        under_test(pytorch, OPTIONS[options], weighted).assert_right(EDGES[case])


def test_what_has_no_weight_may_be_impossible() -> None:
    tested, rows = under_test(pytorch, OPTIONS["both"], weighted=True), random_rows(3, 40)
    rows.x[:, class_weights(40) == 0] = -INF
    ours, exact = tested.run(rows, torch.float64), tested.defined(rows)
    assert ours.values[0].isfinite().any()
    torch.testing.assert_close(tuple(ours), tuple(exact))


def test_the_first_of_several_likeliest() -> None:
    tested, rows = under_test(pytorch, OPTIONS["plain"], weighted=False, ids=True), random_rows(2, 40)
    rows.x[:, [7, 30]] = 50.0
    assert tested.run(rows).values[IDS].tolist() == [7.0, 7.0]
