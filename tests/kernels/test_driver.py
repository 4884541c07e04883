"""The chunk driver: which GEMMs are made, on how many rows, with how much memory, in which precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from fake_products import into_fp32
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from loss_cases import each_need, eager, frozen_or_all, fused, fused_output
from problem import Problem, make_problem
from property_settings import PROPERTY
from sparse_cases import peaked_problem, use_small_blocks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastkl.kernels import chunking, driver, gemm
from fastkl.kernels.operators import library
from fastkl.kernels.options import Sparse
from fastkl.kernels.problem import HeadOptions, Inputs, Needs, Spec
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.sparse import estimator as sparse_estimator

Gemms = dict[str, list[int]]
N = 10


def full_problem() -> Problem:
    """No row is left out."""
    p = make_problem((N,))
    return p._replace(tokens=p.tokens.clamp(min=0), mask=None, advantages=p.advantages.abs() + 1)


def rows(gemms: Gemms) -> tuple[int, int, int]:
    """Rows that went through (logits, hidden gradient, weight gradient), and a fresh start."""
    counts = tuple(sum(calls) for calls in gemms.values())
    for calls in gemms.values():
        calls.clear()
    return counts


# For each loss: is it composed (any upstream gradient), and how many heads does it project?
FORMS: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    "linear_logprobs": ("linear_logprobs", {}, True, 1),
    "policy_gradient": ("policy_gradient", {}, False, 1),
    "policy_gradient-none": ("policy_gradient", {"reduction": "none"}, True, 1),
    "sampled_reverse_kl": ("sampled_reverse_kl", {}, False, 1),
    "reverse_kl": ("reverse_kl", {}, False, 2),
    "reverse_kl-none": ("reverse_kl", {"reduction": "none"}, True, 2),
}


@pytest.mark.parametrize("chunk_size", [None, 3])
@each_need
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_plan(
    gemms: Gemms, form: tuple[str, dict[str, Any], bool, int], needs: tuple[str, ...], chunk_size: int | None
) -> None:
    name, options, composed, heads = form
    p = full_problem().leaves(needs)
    gradients = (N * ("hidden" in needs), N * ("weight" in needs))
    value = fused(name, p, chunk_size=chunk_size, **options)
    recomputes = composed and needs != ("hidden",)
    assert rows(gemms) == ((N * heads, 0, 0) if recomputes else (N * heads, *gradients))
    value.sum().backward()
    assert rows(gemms) == ((N * heads, *gradients) if recomputes else (0, 0, 0))


@pytest.mark.parametrize("why", ["nothing-requires-grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nobody_needs_a_gradient(gemms: Gemms, form: tuple[str, dict[str, Any], bool, int], why: str) -> None:
    name, options, _, heads = form
    p = full_problem().leaves(() if why == "nothing-requires-grad" else ("hidden", "weight", "bias"))
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)
    with context():
        value = fused(name, p, **options)
    assert not value.requires_grad
    assert rows(gemms) == (N * heads, 0, 0)


def test_chunks_are_even(gemms: Gemms) -> None:
    """10 rows with room for 9: two halves rather than 9 + 1, for a GEMM of one row is slow."""
    for limit, expected in ((4, [3, 4, 3]), (9, [5, 5]), (10, [10]), (1, [1] * 10), (1000, [10])):
        fused("linear_logprobs", full_problem(), chunk_size=limit)
        assert gemms["project"] == expected
        rows(gemms)


@pytest.mark.parametrize("heads", [1, 2])
def test_default_chunk_size_fits_the_budget(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    monkeypatch.setitem(chunking.WORKSPACE_BYTES, "cpu", 40_000)
    monkeypatch.setitem(chunking.LEAST_ROWS, "cpu", 2)
    hidden, weight = torch.zeros(100, 2), torch.zeros(1000, 2)  # 4 kB per row of float32 logits
    spec = (
        Spec("token_nll", HeadOptions())
        if heads == 1
        else Spec("divergence", HeadOptions(), HeadOptions(), variant="reverse_kl")
    )
    for gradient in (False, True):
        assert chunking.chunk_rows(spec, Inputs(hidden, weight), gradient) == 10 // heads
        assert chunking.chunk_rows(spec, Inputs(hidden.double(), weight.double()), gradient) == 5 // heads
        assert chunking.chunk_rows(spec, Inputs(hidden, torch.zeros(10**6, 2)), gradient) == 2  # more than the budget


def test_chunks_of_a_sample_are_even_and_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sparse_estimator.BLOCK_ROWS, "cpu", 4)
    spec = Spec("token_nll", HeadOptions(), sparse=Sparse(0, error=2e-3))
    inputs = Inputs(torch.zeros(30, 2), torch.zeros(10, 2))
    for limit, expected in ((30, 30), (29, 16), (16, 16), (12, 12), (7, 4), (4, 4), (3, 3)):
        assert chunking.chunk_rows(spec._replace(chunk_size=limit), inputs, gradient=True) == expected


HEADS_OF_A_PROBLEM = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def on_a_gpu(n: int, vocabulary: int, dim: int, dtype: torch.dtype) -> Inputs:
    with FakeTensorMode():
        return Inputs(*(torch.empty(rows, dim, dtype=dtype, device="cuda") for rows in (n, vocabulary)))


SPECS = {
    "one head": Spec("token_nll", HeadOptions()),
    "two heads": Spec("divergence", HeadOptions(), HeadOptions(), variant="reverse_kl"),
    "sample": Spec("token_nll", HeadOptions(), sparse=Sparse(0)),
}


@PROPERTY
@given(
    spec=st.sampled_from(list(SPECS.values())),
    n=st.integers(1, 20000),
    vocabulary=st.sampled_from([1000, 32000, 49152, 151665, 151936, 256000, 1000003]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    gradient=st.booleans(),
    chunk_size=st.none() | st.integers(1, 5000),
)
def test_chunks_on_a_gpu_are_whole_tiles(
    spec: Spec, n: int, vocabulary: int, dtype: torch.dtype, gradient: bool, chunk_size: int | None
) -> None:
    """Of 256 rows, or of 128 where no more fit; then no more rows are padded than one product of all would have."""
    inputs, spec = on_a_gpu(n, vocabulary, 64, dtype), spec._replace(chunk_size=chunk_size)
    chunks = chunking.row_chunks(spec, inputs, gradient)
    sizes = [rows.stop - rows.start for rows in chunks]
    assert sum(sizes) == n
    sampled = gradient and spec.sparse is not None
    budget = chunking.WORKSPACE_BYTES["accelerator"] // chunking.workspace_bytes_per_row(spec, inputs, gradient)
    limit = max(budget, 1024 if sampled else 1) if chunk_size is None else chunk_size
    block = 1024 if sampled and limit >= 1024 else 256 if limit >= 256 else 128 if limit >= 128 else 1
    assert all(size % block == 0 for size in sizes[:-1])
    assert len(sizes) == (1 if n <= limit else -(-n // (limit - limit % block)))
    rows = chunking.chunk_rows(spec, inputs, gradient)
    assert max(sizes) <= rows <= limit
    assert rows % block == 0 or rows == n
    if block > 1:
        assert sum(-size % 128 for size in sizes) == -n % 128


@PROPERTY
@given(
    n=st.integers(1, 40000),
    vocabulary=st.sampled_from([32000, 151936, 256000, 1000003]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    spec=st.sampled_from(list(SPECS.values())),
    chunk_size=st.none() | st.integers(1, 5000),
    trained=st.booleans(),
)
def test_products_are_long(
    spec: Spec, n: int, vocabulary: int, dtype: torch.dtype, chunk_size: int | None, trained: bool
) -> None:
    inputs, spec = on_a_gpu(n, vocabulary, 64, dtype), spec._replace(chunk_size=chunk_size)
    chunks = chunking.row_chunks(spec, inputs, gradient=True)
    groups = chunking.products(spec, inputs, Needs(True, trained, False))
    assert [rows for group in groups for rows in group] == chunks
    if dtype == torch.float32 or spec.sparse is not None or chunk_size is not None:
        assert len(groups) == len(chunks)
        return
    longest = max(group[-1].stop - group[0].start for group in groups)
    most = chunking.chunk_rows(spec, inputs, gradient=True)
    logits = most * chunking.workspace_bytes_per_row(spec, inputs, gradient=False)
    taken = logits + max(most, longest) * gemm.row_length(vocabulary, inputs.hidden.device) * 2
    if trained:
        assert longest < chunking.LONG_PRODUCT_ROWS + 4096
        assert len(groups) <= -(-n // chunking.LONG_PRODUCT_ROWS)
    else:
        assert taken <= max(chunking.WORKSPACE_BYTES["accelerator"], most * (logits // most + 2 * vocabulary + 128))
        assert len(groups) == len(chunks) or longest > most


def test_a_gradient_in_low_precision_counts_in_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where the GEMMs of a bf16 head want a bf16 gradient beside the fp32 logits."""
    monkeypatch.setattr(gemm, "_writes_fp32", lambda operand: True)
    inputs = Inputs(torch.zeros(100, 2, dtype=torch.bfloat16), torch.zeros(1000, 2, dtype=torch.bfloat16))
    spec = Spec("token_nll", HeadOptions())
    assert chunking.workspace_bytes_per_row(spec, inputs, gradient=False) == 4000
    assert chunking.workspace_bytes_per_row(spec, inputs, gradient=True) == 6000


# Ten rows: 0 masked, 1 ignored, 2 of zero advantage, 3 masked and ignored, 4 … 9 take part in everything.
GRADED, ACTIVE = 6, 7


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen-head", "trainable"])
@pytest.mark.parametrize(
    ("name", "options", "forward", "graded"),
    [
        ("policy_gradient", {}, ACTIVE, GRADED),
        ("policy_gradient", {"reduction": "none"}, ACTIVE, GRADED),
        ("reverse_kl", {}, 2 * ACTIVE, ACTIVE),
        ("linear_logprobs", {}, N - 2, N - 2),
    ],
    ids=["policy_gradient", "policy_gradient-none", "reverse_kl", "linear_logprobs"],
)
def test_rows_of_no_weight_take_no_part(
    gemms: Gemms, name: str, options: dict[str, Any], forward: int, graded: int, needs: tuple[str, ...]
) -> None:
    p = full_problem()
    mask, advantages, tokens = torch.ones(N), p.advantages.clone(), p.tokens.clone()
    mask[[0, 3]], tokens[[1, 3]], advantages[2] = 0.0, -100, 0.0
    p = p._replace(mask=mask, advantages=advantages, tokens=tokens).leaves(needs)
    value = fused(name, p, **options)
    first = rows(gemms)
    assert first[0] == forward
    value.sum().backward()
    second = rows(gemms)
    # Hidden gradients are always made once; the weight's too.
    assert first[1] + second[1] == graded
    assert first[2] + second[2] == graded * ("weight" in needs)
    if name == "policy_gradient":
        logprobs = fused_output(name, p).logprobs
        assert logprobs is not None
        assert (logprobs != 0).tolist() == [False, False, True, False] + [True] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@frozen_or_all
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_no_tensor_of_tokens_by_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
    form: tuple[str, dict[str, Any], bool, int],
    needs: tuple[str, ...],
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    for operator in ("_evaluate", "_evaluate_with_gradients"):  # a dispatch mode does not see into an operator
        monkeypatch.setattr(library, operator, getattr(library, operator)._init_fn)
    name, options, _, _ = form
    n, vocabulary, dim, chunk = 600, 700, 4, 8
    p = make_problem((n,), vocabulary, dim, dtype=dtype).leaves(needs)
    with LargestTensor() as seen:
        fused(name, p, chunk_size=chunk, softcap=softcap, **options).sum().backward()
    # The workspace of a chunk, and tensors of the size of an input.
    allowed = max(chunk * vocabulary, vocabulary * (dim + 2), n * (dim + 2))
    assert chunk * vocabulary <= seen.numel <= allowed < n * vocabulary / 50


@pytest.mark.parametrize("backward", ["exact", Sparse(1, error=0.05)], ids=["exact", "sparse"])
@frozen_or_all
@pytest.mark.parametrize("name", ["linear_logprobs", "policy_gradient"])
def test_a_row_function_may_leave_a_factor(
    monkeypatch: pytest.MonkeyPatch, name: str, needs: tuple[str, ...], backward: Any
) -> None:
    """Of any size: losses and gradients are those without, the sample too. One of NaN in a row of no weight is none."""
    use_small_blocks(monkeypatch)
    p = peaked_problem(48, torch.float64, 300)
    p.advantages[::5] = 0.0
    options = {"backward": backward, "skip_zero_rows": False, "chunk_size": 16}
    expected = with_gradients(fused, name, p, needs, **options)
    original, seen = driver.row_function, []

    def row_function(spec: Spec, hidden: Tensor) -> Any:
        evaluate = original(spec, hidden)

        def function(logits: Logits, tokens: Tensor | None, out: Tensor, gradient: Tensor | None) -> Tensor | None:
            evaluate(logits, tokens, out, gradient)
            if gradient is None:
                return None
            factor = torch.logspace(-9, 3, len(gradient), dtype=gradient.dtype)
            gradient /= factor[:, None]
            if name == "policy_gradient":
                factor[(sum(seen) + torch.arange(len(factor))) % 5 == 0] = torch.nan
            seen.append(len(factor))
            return factor

        return function

    monkeypatch.setattr(driver, "row_function", row_function)
    found = with_gradients(fused, name, p, needs, **options)
    assert sum(seen) >= 48
    torch.testing.assert_close(found.value, expected.value)
    for field, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[field], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_accumulators_are_in_the_compute_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    seen, original = set(), driver.add_weight_gradient

    def spy(accumulator: Tensor, *rest: Any, **options: Any) -> None:
        seen.add(accumulator.dtype)
        original(accumulator, *rest, **options)

    monkeypatch.setattr(driver, "add_weight_gradient", spy)
    p = make_problem(dtype=dtype).leaves()
    value = fused("reverse_kl", p, chunk_size=2)
    value.backward()
    assert seen == {torch.float64 if dtype == torch.float64 else torch.float32} == {value.dtype}
    assert {getattr(p, f).grad.dtype for f in ("hidden", "weight", "bias")} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["policy_gradient", "entropy", "reverse_kl", "top_k", "linear_logprobs"])
def test_gradients_of_several_chunks_in_one_product(
    monkeypatch: pytest.MonkeyPatch, gemms: Gemms, name: str, dtype: torch.dtype
) -> None:
    """As on CUDA: the same gradients as from a product for each chunk, up to the order of sums in fp32."""
    into_fp32(monkeypatch)
    p = full_problem()._replace(**{f: getattr(make_problem((N,), dtype=dtype), f) for f in HEADS_OF_A_PROBLEM})
    found = {}
    for long_rows, expected in ((1, [3, 4, 3]), (5, [7, 3]), (N, [N])):
        monkeypatch.setitem(chunking.LEAST_ROWS, "cpu", 4)
        monkeypatch.setitem(chunking.WORKSPACE_BYTES, "cpu", 1)
        monkeypatch.setattr(chunking, "LONG_PRODUCT_ROWS", long_rows)
        rows(gemms)
        found[long_rows] = with_gradients(fused, name, p)
        assert gemms["add_weight_gradient"] == gemms["hidden_gradient"] == expected
    exact = with_gradients(eager, name, p.double())
    for result in found.values():
        assert torch.equal(result.value, found[1].value)
        for field, gradient in result.gradients.items():
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(gradient, found[1].gradients[field], rtol=2 * eps, atol=eps * 1e-2)
            torch.testing.assert_close(gradient.double(), exact.gradients[field], rtol=0.1, atol=10 * eps)
