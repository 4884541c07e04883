"""`token_nll` in PyTorch, which the kernels in Triton are measured against: the definition, and the rules at the edges."""

from __future__ import annotations

import pytest
import torch
from row_cases import UnderTest, edges, random_rows
from row_contract import RowContract

from fastkl import reference
from fastkl.kernels.rows import pytorch as rows_pytorch

EDGES = edges(64, 61)


@pytest.fixture
def tested() -> UnderTest:
    function = rows_pytorch.token_nll
    return UnderTest(function, function, lambda z, _, y: -reference.logprobs(z, y)[None])


class TestTokenNll(RowContract):
    @pytest.mark.parametrize("cap", [None, 2.5])
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 1009])
    def test_definition(self, tested: UnderTest, vocabulary: int, cap: float | None) -> None:
        rows = random_rows(5, vocabulary)._replace(caps=(cap, None))
        ours, exact = tested.run(rows, torch.float64), tested.defined(rows)
        torch.testing.assert_close(tuple(ours), tuple(exact), rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("case", EDGES)
    def test_edges(self, tested: UnderTest, case: str) -> None:
        """float32 where float64 is."""
        tested.assert_right(EDGES[case])
