"""The products of the driver: by blocks and by tiles of the vocabulary, and rows spread evenly over chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_products import into_fp32
from hypothesis import given
from hypothesis import strategies as st
from problem import generator
from property_settings import PROPERTY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastkl.kernels import driver, gemm
from fastkl.kernels.gemm import TILE_COLUMNS, even_chunks, most_rows, project
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


@PROPERTY
@given(st.integers(0, 3000), st.integers(1, 300), st.sampled_from([1, 4, 16]))
def test_rows_are_spread_evenly(n: int, limit: int, multiple: int) -> None:
    limit = max(limit, multiple)
    sizes = [rows.stop - rows.start for rows in even_chunks(n, limit, multiple)]
    assert sum(sizes) == n
    assert most_rows(even_chunks(n, limit, multiple)) == max(sizes, default=0) <= limit
    assert len(sizes) == (n > 0 if n <= limit else -(-n // (limit - limit % multiple)))
    if len(sizes) > 1:
        *others, last = sizes
        assert all(size % multiple == 0 for size in others)
        assert max(others) - min(others) <= multiple
        full = limit - limit % multiple
        assert last > 0
        assert 2 * abs(last - n / len(sizes)) <= multiple or set(others) <= {full - multiple, full}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@alphas
@biases
def test_alpha_is_in_the_product(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, alpha: float, has_bias: bool
) -> None:
    """As on CUDA: one product into fp32, whatever is in the way of it, and no pass over its result for alpha."""
    calls = into_fp32(monkeypatch)
    h, w, b = (t.to(dtype) for t in operands(4, 11, 5)[:3])
    out = torch.full((4, 11), torch.nan)
    project(h, w, b if has_bias else None, alpha, out)
    expected = alpha * (h.float() @ w.float().t() + (b.float() if has_bias else 0))
    torch.testing.assert_close(out, expected)
    (call,) = calls
    assert call["self"] is call["out"] is out
    assert call["out_dtype"] == torch.float32
    assert (call["beta"], call["alpha"]) == (0.0, alpha)
    assert [t.dtype for t in call["operands"]] == [dtype, dtype]


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_into(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, into: torch.dtype) -> None:
    """One rounding, by blocks of rows or not, of matrices and of vectors."""
    monkeypatch.setattr(gemm, "CAST_BYTES", 3 * 7 * 4)
    factor = torch.tensor([1 / 3])
    for shape in ((0, 7), (10, 7), (25,)):
        tensor = torch.randn(shape, generator=generator(0)).to(dtype)
        out = gemm.scaled_into(torch.full(shape, torch.nan, dtype=into), tensor, factor)
        assert torch.equal(out, (tensor.float() * factor).to(into))


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_gradient_of_16_bits_is_that_of_fp32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float
) -> None:
    """Scales that 16 bits do not hold, all of one sign: their errors would add up."""
    calls = into_fp32(monkeypatch)
    n, vocabulary = 300, 17
    u = torch.randn(n, vocabulary, generator=generator(0)).abs().to(dtype)
    for scale in (torch.full((n,), size / 3), size * torch.randn(n, generator=generator(1)), torch.zeros(n)):
        accumulator = torch.full((vocabulary,), size)
        gemm.add_bias_gradient(accumulator, u, scale)
        expected = size + u.double().t() @ scale.double()
        torch.testing.assert_close(accumulator.double(), expected, rtol=1e-6, atol=n * size * 1e-7)
    assert [call["operands"][0].shape for call in calls] == [(3, n)] * 3
