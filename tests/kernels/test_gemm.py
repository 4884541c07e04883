"""The products of the driver: by blocks and by tiles of the vocabulary, and rows spread evenly over chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import generator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkl.kernels import driver, gemm
from fastkl.kernels.gemm import TILE_COLUMNS, even_rows, project
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, RowLoss, Spec

biases = pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
alphas = pytest.mark.parametrize("alpha", [1.0, 0.3])


def operands(n: int, vocabulary: int, dim: int) -> list[Tensor]:
    """Hidden states, weight, bias, the gradient of scores, and a scale for each row."""
    g = generator(0)
    return [torch.randn(s, generator=g) for s in ((n, dim), (vocabulary, dim), (vocabulary,), (n, vocabulary), (n,))]


@alphas
@biases
@pytest.mark.parametrize("block", [1, 3, 100])  # rows of the weight cast up at a time: one, a remainder of 2, all
def test_products_in_blocks_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, block: int, has_bias: bool, alpha: float
) -> None:
    n, vocabulary, dim = 4, 11, 5
    monkeypatch.setattr(gemm, "UPCAST_BLOCK_BYTES", block * dim * 4)
    *heads, u, scale = operands(n, vocabulary, dim)
    h, w, b = (t.bfloat16() for t in heads)
    out = torch.full((n, vocabulary), torch.nan)
    project(h, w, b if has_bias else None, alpha, out)
    torch.testing.assert_close(out, alpha * (h.float() @ w.float().t() + (b.float() if has_bias else 0)))
    torch.testing.assert_close(gemm.hidden_gradient(u, w), u @ w.float())
    accumulator, expected = torch.ones(vocabulary, dim), u.t() @ (scale[:, None] * h.float())
    gemm.add_weight_gradient(accumulator, u, h, scale)
    torch.testing.assert_close(accumulator, 1 + expected)
    accumulator.fill_(torch.nan)
    gemm.add_weight_gradient(accumulator, u, h, scale, overwrite=True)
    torch.testing.assert_close(accumulator, expected)


@alphas
@biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_several_tiles(dtype: torch.dtype, alpha: float, has_bias: bool) -> None:
    vocabulary = 2 * TILE_COLUMNS + 3
    h, w, b = (t.to(dtype) for t in operands(5, vocabulary, 6)[:3])
    out = torch.full((5, vocabulary), torch.nan)
    project(h, w, b if has_bias else None, alpha, out)
    plain = h.double() @ w.double().t() + (b.double() if has_bias else 0.0)
    torch.testing.assert_close(out.double(), alpha * plain, rtol=1e-5, atol=1e-5)


PRODUCTS = ("mm", "addmm", "matmul")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_rounding_of_float32_operands_is_the_users_choice(precision: str) -> None:
    """Every product of a loss sees the setting, as the model's own do, and it is left as it was."""
    seen: list[str] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ in PRODUCTS:
                seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    h, w, _, _, scale = operands(4, 11, 5)
    inputs, spec = Inputs(h, w, tokens=torch.zeros(4, dtype=torch.int64)), Spec("token_nll", HeadOptions())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with Spy():
            driver.evaluate_with_gradients(spec, inputs, RowLoss(scale), Needs(True, True, False))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == 3 * [precision]


@given(st.integers(0, 3000), st.integers(1, 700))
def test_rows_are_spread_evenly(n: int, limit: int) -> None:
    step = even_rows(n, limit)
    assert 1 <= step <= limit
    parts = [min(step, n - start) for start in range(0, n, step)]
    assert sum(parts) == n
    assert len(parts) == -(-n // limit)
