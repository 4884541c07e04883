"""The losses on a GPU: against float64, against eager PyTorch, against themselves, and at sizes that a CPU never sees.

What is bitwise there and what is not: the same call gives the same bits. Another chunk size, or other rows around a row,
gives other bits, because the vendor's GEMM picks its kernel by the number of rows; the difference is float32 rounding in
the values and the rounding of the inputs' dtype in the gradients. The row kernels themselves do not depend on it
(tests/kernels/rows/test_triton.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import Result, assert_results_as_accurate, assert_same, largest, logit_scale, with_gradients
from devices import DEVICE, DRY_RUN, gpu, needs_device
from loss_cases import FORMS, HEADS, NEEDS, each_of, eager, fused, fused_output
from problem import TRAINABLE, Problem, make_problem
from torch import Tensor

pytestmark = gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
forms = each_of(FORMS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def problem(
    dtype: torch.dtype, vocabulary: int = 1009, lead: tuple[int, ...] = (5, 23), dim: int = 64, **options: Any
) -> Problem:
    """On the device, sampled under the head's own options."""
    vocabulary = min(vocabulary, 4099) if DRY_RUN else vocabulary
    return make_problem(lead, vocabulary, dim, dtype).sampled_under(**options).to(DEVICE)


def assert_accurate(name: str, p: Problem, needs: tuple[str, ...], **options: Any) -> None:
    """An error no larger than that of eager PyTorch on the same device and in the same dtype."""
    ours, peer, exact = (
        with_gradients(function, name, given, needs, **options)
        for function, given in ((fused, p), (eager, p), (eager, p.double()))
    )
    assert_results_as_accurate(ours, peer, exact, p, **options)


# The dtype chooses the GEMMs and where a gradient is stored, the needs choose the plan, the head changes what row functions
# read: each head and each need with each dtype, and the head that has everything with each need.
PAIRS = [
    *[(head, "all") for head in HEADS],
    ("plain", "frozen-head"),
    ("plain", "bias-only"),
    ("all-chunked", "frozen-head"),
    ("all-chunked", "bias-only"),
]


@forms
@dtypes
@pytest.mark.parametrize(("head", "needs"), PAIRS)
def test_error_no_larger_than_eager(
    name: str, options: dict[str, Any], dtype: torch.dtype, needs: str, head: str
) -> None:
    assert_accurate(name, problem(dtype, **HEADS[head]), NEEDS[needs], **options, **HEADS[head])


@forms
@dtypes
@pytest.mark.parametrize("vocabulary", [50257, 262144])  # GPT-2: odd; Gemma 3: the largest in use
def test_real_vocabularies(name: str, options: dict[str, Any], dtype: torch.dtype, vocabulary: int) -> None:
    assert_accurate(name, problem(dtype, vocabulary, (50,)), TRAINABLE, chunk_size=32, **options)


@forms
def test_float64_is_exact(name: str, options: dict[str, Any]) -> None:
    """What the accuracy of the others is measured against has no trouble of its own on the device."""
    p = problem(torch.float64)
    assert_same(*(with_gradients(function, name, p, **options) for function in (fused, eager)))


def assert_close(ours: Result, other: Result, p: Problem) -> None:
    """Values to the rounding of float32 logits, gradients to that of their own dtype."""
    rounding = 16 * torch.finfo(torch.float32).eps * logit_scale(p)
    torch.testing.assert_close(ours.value, other.value, rtol=rounding, atol=rounding)
    for field, gradient in ours.gradients.items():
        size = largest(other.gradients[field])
        own = 4 * torch.finfo(gradient.dtype).eps + rounding
        torch.testing.assert_close(gradient, other.gradients[field], rtol=own, atol=own * size)


@forms
@dtypes
def test_same_call_same_bits(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = problem(dtype, 50257, (4, 300))
    first, again = (with_gradients(fused, name, p, chunk_size=500, **options) for _ in range(2))
    assert torch.equal(first.value, again.value)
    for field, gradient in first.gradients.items():
        assert torch.equal(gradient, again.gradients[field]), field


@forms
@dtypes
@pytest.mark.parametrize("chunk_size", [1, 17, 64])
def test_chunk_size_is_rounding(name: str, options: dict[str, Any], dtype: torch.dtype, chunk_size: int) -> None:
    p = problem(dtype)
    whole, parts = (with_gradients(fused, name, p, chunk_size=size, **options) for size in (None, chunk_size))
    assert_close(parts, whole, p)


@forms
@dtypes
def test_rows_left_out_or_computed(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = problem(dtype)
    left_out, computed = (with_gradients(fused, name, p, skip_zero_rows=skip, **options) for skip in (True, False))
    assert_close(computed, left_out, p)


@needs_device
@forms
@dtypes
def test_backends_agree(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = problem(dtype, 50257, softcap=5.0)
    triton, torch_ = (
        with_gradients(fused, name, p, backend=backend, softcap=5.0, **options) for backend in ("triton", "torch")
    )
    assert_close(triton, torch_, p)


@forms
@dtypes
def test_weight_grad(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Two micro-batches add up in float32 what the optimizer would have been given in the weight's dtype."""
    p = problem(dtype)
    expected = with_gradients(fused, name, p, **options).gradients["weight"].float()
    total = torch.zeros_like(expected)
    for _ in range(2):
        assert not with_gradients(fused, name, p, weight_grad=total, **options).gradients["weight"].any()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total, 2 * expected, rtol=2 * eps, atol=4 * eps * largest(expected))


@forms
@dtypes
def test_all_masked(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    p = problem(dtype)
    p = p._replace(mask=torch.zeros_like(p.mask), tokens=torch.full_like(p.tokens, -100))
    result = with_gradients(fused, name, p, **options)
    assert not result.value.any()
    assert not any(gradient.any() for gradient in result.gradients.values())


@dtypes
@pytest.mark.parametrize("skip", [True, False], ids=["left-out", "computed"])
def test_identical_student_and_teacher(dtype: torch.dtype, skip: bool) -> None:
    p = problem(dtype)
    p = p._replace(teacher_hidden=p.hidden, teacher_weight=p.weight, teacher_bias=p.bias)
    result = with_gradients(fused, "reverse_kl", p, reduction="none", skip_zero_rows=skip)
    assert not result.value.any()
    assert not any(gradient.any() for gradient in result.gradients.values())


@pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl"])
def test_more_logits_than_int32_counts(name: str) -> None:
    """One chunk of more than 2³¹ logits: its rows, the last ones above all, are those of many chunks and of float64."""
    n, dim, vocabulary = (40, 16, 1009) if DRY_RUN else (16400, 64, 131_101)
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, device=DEVICE) * scale

    tokens = torch.randint(vocabulary, (n,), generator=g, device=DEVICE)
    heads = [t.bfloat16() for t in (normal(n, dim), normal(vocabulary, dim, scale=2 / dim**0.5))]
    theirs = [t.bfloat16() for t in (normal(n, dim), normal(vocabulary, dim, scale=2 / dim**0.5))]
    p = Problem(*heads, None, tokens, None, normal(n), None, normal(n), *theirs, None)
    needs = ("hidden", "weight")
    one, many = (with_gradients(fused, name, p, needs, chunk_size=size) for size in (n, None))
    torch.testing.assert_close(one.value, many.value, rtol=1e-4, atol=1e-4)
    for field in needs:
        gap = (one.gradients[field].float() - many.gradients[field].float()).norm()
        assert float(gap) <= 1e-2 * float(many.gradients[field].float().norm()), field
    with torch.no_grad():
        logprobs = fused_output(name, p, chunk_size=n).logprobs
    assert logprobs is not None
    last = p._replace(hidden=p.hidden[-8:], tokens=tokens[-8:]).double()
    torch.testing.assert_close(logprobs[-8:].double(), eager("linear_logprobs", last), rtol=0, atol=1e-4)
