"""The cross-entropy in Triton: as accurate as the one in PyTorch, with the same rules at the edges.

It runs on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cross_entropy_cases import BEYOND, IDS, OPTIONS, class_weights, under_test
from devices import triton_device
from row_cases import INF, UnderTest, edges, random_rows
from row_contract import TritonContract, assert_far_apart_rows_are_right, outside

from fastkl.kernels.rows.cross_entropy import triton
from fastkl.kernels.rows.launch import row_config

DEVICE = triton_device()
BLOCK = row_config(1).block_n
WIDE = BLOCK + 3  # two blocks
EDGES = edges(WIDE, BLOCK)
each_option = pytest.mark.parametrize("options", OPTIONS)
weighted = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])


@pytest.fixture
def tested() -> UnderTest:
    return under_test(triton, OPTIONS["both"], weighted=True, device=DEVICE)


class TestCrossEntropy(TritonContract):
    wide = WIDE

    @each_option
    @weighted
    @pytest.mark.parametrize("vocabulary", [7, 2 * BLOCK + 17])
    def test_widths(self, vocabulary: int, options: str, weighted: bool) -> None:
        under_test(triton, OPTIONS[options], weighted, DEVICE).assert_right(random_rows(2, vocabulary))

    @pytest.mark.parametrize("options", ["plain", "both"])
    @pytest.mark.parametrize("vocabulary", [1, BLOCK, BLOCK + 1])
    def test_soft_caps(self, vocabulary: int, options: str) -> None:
        rows = random_rows(2, vocabulary)._replace(caps=(2.5, None))
        under_test(triton, OPTIONS[options], options == "both", DEVICE).assert_right(rows)

    @pytest.mark.parametrize("case", [case for case in EDGES if case != BEYOND])
    def test_edges(self, tested: UnderTest, case: str) -> None:
        tested.assert_right(EDGES[case])

    def test_a_large_vocabulary_in_bf16(self, tested: UnderTest) -> None:
        tested.assert_right(random_rows(2, 50257), torch.bfloat16)

    @pytest.mark.parametrize("y", outside(WIDE))
    def test_a_token_outside_the_vocabulary_is_nan(self, tested: UnderTest, y: int) -> None:
        values, gradient = tested.run(random_rows(2, WIDE)._replace(y=torch.tensor([5, y])))
        assert values[0].isnan().tolist() == [False, True]
        assert gradient[0].isfinite().all()
        assert gradient[1].isnan().all()

    def test_offsets_beyond_int32(self, tested: UnderTest, tmp_path: Path) -> None:
        assert_far_apart_rows_are_right(tested, tmp_path)


def test_what_has_no_weight_may_be_impossible() -> None:
    tested, rows = under_test(triton, OPTIONS["both"], weighted=True, device=DEVICE), random_rows(2, WIDE)
    rows.x[:, class_weights(WIDE) == 0] = -INF
    assert tested.assert_right(rows).values[0].isfinite().any()


@pytest.mark.parametrize("places", [(7, 30), (30, BLOCK + 1), (WIDE - 1,), (0, WIDE - 1)])
def test_the_first_of_several_likeliest(places: tuple[int, ...]) -> None:
    tested, rows = under_test(triton, OPTIONS["plain"], weighted=False, device=DEVICE, ids=True), random_rows(2, WIDE)
    rows.x[:, places] = 50.0
    assert tested.run(rows).values[IDS].tolist() == [places[0]] * 2
    others = tested.run(random_rows(3, WIDE)).values[IDS]
    assert others.tolist() == random_rows(3, WIDE).x.argmax(-1).tolist()
