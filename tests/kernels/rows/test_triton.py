"""`token_nll` and the entropy terms in Triton: as accurate as those in PyTorch, with the same rules at the edges.

They run on a GPU where there is one, and else in Triton's interpreter (test_interpreted.py).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from devices import triton_device
from row_cases import (
    INF,
    Outcome,
    Rows,
    UnderTest,
    assert_same_bits,
    assert_terms_accurate,
    biases,
    edges,
    hard_rows,
    random_rows,
    run,
)
from row_contract import TritonContract, assert_far_apart_rows_are_right, outside
from torch import Tensor

from fastkl import reference
from fastkl.kernels.rows import pytorch as rows_pytorch
from fastkl.kernels.rows import triton as rows_triton
from fastkl.kernels.rows.interface import Logits, RowFunction
from fastkl.kernels.rows.launch import row_config

DEVICE = triton_device()
# A chunk of bf16 is stored as such: rounded to 8 bits on a GPU, cut off after them by the interpreter.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BLOCK = row_config(1).block_n
WIDE = BLOCK + 3  # two blocks
EDGES = edges(WIDE, BLOCK)


@pytest.fixture
def tested() -> UnderTest:
    functions = rows_triton.token_nll, rows_pytorch.token_nll
    return UnderTest(*functions, lambda z, _, y: -reference.logprobs(z, y)[None], device=DEVICE)


class TestTokenNll(TritonContract):
    wide = WIDE

    # 7 and 1009: primes. Around one block and two. 50257: odd, many blocks.
    @dtypes
    @pytest.mark.parametrize("vocabulary", [1, 2, 7, 1009, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 17, 50257])
    def test_widths(self, tested: UnderTest, vocabulary: int, dtype: torch.dtype) -> None:
        tested.assert_right(random_rows(3, vocabulary), dtype)

    @dtypes
    @pytest.mark.parametrize("cap", [None, 2.5, 30.0])
    def test_soft_caps(self, tested: UnderTest, cap: float | None, dtype: torch.dtype) -> None:
        """Scores from those that tanh leaves alone to those that it saturates."""
        scale = torch.tensor([1e-3, 0.05, 0.25, 1.0, 4.0, 50.0])[:, None]
        tested.assert_right(random_rows(6, WIDE).scaled(scale)._replace(caps=(cap, None)), dtype)

    @pytest.mark.parametrize("case", EDGES)
    def test_edges(self, tested: UnderTest, case: str) -> None:
        tested.assert_right(EDGES[case])

    @pytest.mark.parametrize("y", outside(WIDE))
    def test_a_token_outside_the_vocabulary_is_nan(self, tested: UnderTest, y: int) -> None:
        """Nothing is read there, nothing is written, and a wrong id cannot pass unseen."""
        values, gradient = tested.run(random_rows(2, WIDE)._replace(y=torch.tensor([5, y])))
        assert values[0].isnan().tolist() == [False, True]
        assert gradient[0].isfinite().all()
        assert gradient[1].isnan().all()

    @pytest.mark.parametrize("case", EDGES)
    def test_one_walk(self, tested: UnderTest, case: str) -> None:
        assert_rounded(tested, EDGES[case])

    @pytest.mark.parametrize("vocabulary", [1, 2, 1009, BLOCK, WIDE])
    @pytest.mark.parametrize("cap", [None, 30.0])
    def test_one_walk_over_large_scores(self, tested: UnderTest, vocabulary: int, cap: float | None) -> None:
        """First logits that say nothing of the row: far above others, far below, forbidden; tokens anywhere."""
        rows = random_rows(5, vocabulary)
        rows.x[:3] *= 0.1 if cap else 100.0
        rows.x[3] -= 300.0
        if vocabulary > BLOCK + 1:
            rows.x[4, : BLOCK + 1] = -INF
        assert_rounded(tested, rows._replace(caps=(cap, None)))

    def test_one_walk_in_a_wrong_row(self, tested: UnderTest) -> None:
        """A token outside the vocabulary, NaN, +inf: NaN in its row alone."""
        rows = random_rows(5, WIDE)._replace(y=torch.tensor([-1, WIDE, 3, 4, 5]))
        rows.x[2, WIDE - 2], rows.x[3, 7] = INF, torch.nan
        values, gradient = tested.run(rows, apart=torch.bfloat16)
        assert values[0].isnan().tolist() == [True, True, True, True, False]
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == values[0].isnan().tolist()

    def test_offsets_beyond_int32(self, tested: UnderTest, tmp_path: Path) -> None:
        assert_far_apart_rows_are_right(tested, tmp_path)


def assert_rounded(tested: UnderTest, rows: Rows) -> None:
    """A gradient in bf16 is the exact one but for its rounding; beside 1, p has an error of float32's."""
    ours, exact = tested.run(rows, apart=torch.bfloat16), tested.run_peer(rows, torch.float64)
    assert torch.equal(ours.values, tested.run(rows).values)
    steep = max(1.0, float(exact.gradient.abs().max()))
    torch.testing.assert_close(ours.gradient.double(), exact.gradient, rtol=2**-7, atol=4e-7 * steep)


def entropy(module: ModuleType) -> RowFunction:
    """The two passes as one row function, with weights of both signs on log-prob, entropy and lse."""

    def function(logits: Logits, y: Tensor | None, out: Tensor, gradient: Tensor | None) -> None:
        module.token_nll_entropy(logits, y, out, None)
        if gradient is not None:
            weights = torch.linspace(-1.0, 2.0, 3 * out.shape[1], dtype=out.dtype, device=out.device).reshape(3, -1)
            module.entropy_gradient(logits, y, out, weights, gradient)

    return function


def run_entropy(rows: Rows, apart: torch.dtype | None = None) -> Outcome:
    return run(entropy(rows_triton), rows, torch.float32, 5, DEVICE, apart=apart)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [5, 1009, BLOCK, BLOCK + 1, 2 * BLOCK + 17])
@pytest.mark.parametrize("apart", [None, torch.bfloat16, torch.float16], ids=str)
def test_entropy(vocabulary: int, cap: float | None, apart: torch.dtype | None) -> None:
    rows = hard_rows(vocabulary, cap)
    plain = [run(entropy(rows_pytorch), rows, dtype, 5) for dtype in (torch.float32, torch.float64)]
    assert_terms_accurate(run_entropy(rows, apart), *plain, 0.0 if apart is None else torch.finfo(apart).eps)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_entropy_with_a_bias(cap: float | None) -> None:
    """Added in both passes."""
    rows = random_rows(2, WIDE)._replace(caps=(cap, None), biases=biases(WIDE))
    for apart in (None, torch.bfloat16):
        assert_same_bits(run_entropy(rows, apart), run_entropy(rows.added(), apart))


@pytest.mark.parametrize("y", [-1, 5000])
def test_entropy_of_a_token_outside_the_vocabulary_is_nan(y: int) -> None:
    values, gradient = run_entropy(random_rows(2, 50)._replace(y=torch.tensor([3, y])))
    assert values[0].isnan().tolist() == values[4].isnan().tolist() == [False, True]
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


def test_entropy_of_no_rows() -> None:
    assert [t.numel() for t in run_entropy(random_rows(0, 9))] == [0, 0]


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_a_slope_are_cleared(vocabulary: int, dtype: torch.dtype) -> None:
    """Whatever they hold, beside others that are not touched, and nothing beyond the row."""
    buffer = torch.full((5, vocabulary + 3), torch.nan, dtype=dtype, device=DEVICE)
    slope = torch.tensor([0.0, 2.0, -0.0, torch.nan, 1e-30], device=DEVICE)
    rows_triton.clear_rows(buffer[:, :vocabulary], slope)
    expected = torch.full_like(buffer, torch.nan)
    expected[[0, 2], :vocabulary] = 0.0
    assert torch.equal(buffer.isnan(), expected.isnan())
    assert (buffer[~buffer.isnan()] == 0).all()
