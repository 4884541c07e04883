"""Scoring on a CPU, a tile of the vocabulary at a time: against float64, on hard rows, and its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import generator
from torch import Tensor

from bench.lib.measure import peak_allocated
from fastkl import reference
from fastkl.kernels import gemm
from fastkl.kernels.driver import evaluate
from fastkl.kernels.gemm import TILE_COLUMNS
from fastkl.kernels.problem import HeadOptions, Inputs, Spec
from fastkl.kernels.score import cpu as score_cpu

NLL = Spec("token_nll", HeadOptions())
ENTROPY = NLL._replace(kind="token_nll_entropy")


def expected(inputs: Inputs, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """−log p[y] and the entropy in float64."""
    log_p = logits(inputs, options).log_softmax(-1)
    return -log_p.gather(1, inputs.tokens[:, None]).squeeze(1), torch.special.entr(log_p.exp()).sum(-1)


def logits(inputs: Inputs, options: HeadOptions) -> Tensor:
    """z [n, V] in float64."""
    tensors = (None if t is None else t.double() for t in inputs[:3])
    return reference.logits(*tensors, options.temperature, options.logit_scale, options.softcap)


def problem(n: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Inputs:
    g = generator(seed)
    hidden, weight = torch.randn(n, 6, generator=g), scale * torch.randn(vocabulary, 6, generator=g)
    bias, tokens = torch.randn(vocabulary, generator=g), torch.randint(vocabulary, (n,), generator=g)
    return Inputs(hidden.to(dtype), weight.to(dtype), bias.to(dtype), tokens)


@pytest.mark.parametrize("options", [HeadOptions(0.7, 1.5), HeadOptions(softcap=20.0)], ids=["scaled", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, TILE_COLUMNS, TILE_COLUMNS + 1, 1301])
def test_scores_are_those_of_float64(vocabulary: int, dtype: torch.dtype, options: HeadOptions) -> None:
    inputs = problem(9, vocabulary, dtype)
    values = evaluate(ENTROPY._replace(student=options, chunk_size=4), inputs)
    torch.testing.assert_close(values[:2].double(), torch.stack(expected(inputs, options)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluate(NLL._replace(student=options), inputs)[0], values[0], rtol=1e-6, atol=1e-5)
    z = logits(inputs, options)
    lse, gap = torch.logsumexp(z, -1), z.amax(-1) - z.gather(1, inputs.tokens[:, None]).squeeze(1)
    torch.testing.assert_close((values[2] + values[3]).double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[4].double(), gap, rtol=1e-5, atol=1e-5)


@given(
    st.integers(1, 40), st.integers(1, 1200), st.integers(1, 12), st.integers(0, 5), st.sampled_from([0.1, 3.0, 300.0])
)
def test_any_tile_and_chunk_gives_the_same(n: int, vocabulary: int, chunk: int, seed: int, scale: float) -> None:
    inputs = problem(n, vocabulary, torch.float64, scale, seed)
    nll, entropy = expected(inputs, ENTROPY.student)
    with pytest.MonkeyPatch.context() as patch:
        for module in (gemm, score_cpu):
            patch.setattr(module, "TILE_COLUMNS", 1 + vocabulary // 3)
        values = evaluate(ENTROPY._replace(chunk_size=chunk), inputs)
    torch.testing.assert_close(values[0], nll, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(values[1], entropy, rtol=1e-9, atol=1e-9)


def rows_of(scores: Tensor) -> Inputs:
    """A problem whose logits are exactly these [n, V]."""
    return Inputs(
        torch.eye(scores.shape[0]), scores.t().contiguous(), None, torch.zeros(scores.shape[0], dtype=torch.long)
    )


@pytest.mark.parametrize("place", [0, TILE_COLUMNS - 1, TILE_COLUMNS, 1200])
def test_one_hot_flat_and_huge_rows(place: int) -> None:
    scores = torch.zeros(5, 1201)
    scores[0, place] = 1e4  # one-hot
    scores[1] = -1e4  # flat, far below 0
    scores[2, place] = -1e4
    scores[3] = torch.arange(1201) * -50.0  # the first tile has it all
    scores[4] = torch.arange(1201) * 50.0  # each tile raises the maximum by more than float32's range
    inputs = rows_of(scores)._replace(tokens=torch.full((5,), place))
    nll, entropy = expected(inputs, ENTROPY.student)
    values = evaluate(ENTROPY, inputs).double()
    torch.testing.assert_close(values[0], nll, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(values[1], entropy, rtol=1e-5, atol=1e-4)


def test_tiles_without_a_possible_id() -> None:
    """A bias of −inf forbids ids: a whole first tile, the last one, or the token itself."""
    inputs = problem(3, 1300)
    bias = torch.zeros(1300)
    bias[: TILE_COLUMNS + 5] = bias[-300:] = -torch.inf
    inputs = inputs._replace(bias=bias, tokens=torch.tensor([600, 700, 2]))
    allowed = slice(TILE_COLUMNS + 5, 1000)
    inside = Inputs(inputs.hidden, inputs.weight[allowed], None, torch.tensor([600, 700, 600]) - allowed.start)
    nll, entropy = expected(inside, ENTROPY.student)
    values = evaluate(ENTROPY, inputs).double()
    torch.testing.assert_close(values[0, :2], nll[:2], rtol=1e-5, atol=1e-5)
    assert values[0, 2] == torch.inf
    torch.testing.assert_close(values[1], entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_wrong_with_a_row_shows_in_it_alone(wrong: float) -> None:
    inputs = problem(2, 1100)
    inputs.hidden[0, 0] = wrong
    values = evaluate(ENTROPY, inputs)
    assert values[:2].isnan().tolist() == [[True, False], [True, False]]


def test_no_rows() -> None:
    assert evaluate(ENTROPY, problem(0, 1100)).shape == (5, 0)


def test_memory_is_a_tile() -> None:
    inputs = problem(300, 40_000)
    peak = peak_allocated(lambda: evaluate(NLL._replace(chunk_size=100), inputs), torch.device("cpu"))
    assert peak < 4 * 100 * TILE_COLUMNS + 4 * 300 * 40  # in place of 4 · 300 · 40000 bytes of logits
