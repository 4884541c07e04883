"""Heads and hidden states of two dtypes: cast as autocast would, outside of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import assert_results_as_accurate, with_gradients
from loss_cases import FORMS, LISTS, each_of, eager, fused
from problem import Problem, in_dtype, make_problem

from fastkl.loss import linear_list_logprobs, linear_ranks, linear_top_k, reverse_kl_loss

HEADS = {"hidden": ("weight", "bias"), "teacher_hidden": ("teacher_weight", "teacher_bias")}
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = {
    f"{key}-{which}": (dtype, fields)
    for key, dtype in LOW.items()
    for which, fields in {
        "hidden": ("hidden", "teacher_hidden"),
        "weight": ("weight", "teacher_weight"),
        "weight-and-bias": ("weight", "bias", "teacher_weight", "teacher_bias"),
        "all-but-bias": ("hidden", "weight", "teacher_hidden", "teacher_weight"),
    }.items()
    if key == "bf16" or which == "hidden"
}
each_mix = pytest.mark.parametrize(("dtype", "low"), MIXED.values(), ids=MIXED)


def all_low(name: str, p: Problem, dtype: torch.dtype) -> Problem:
    own = [field for hidden, head in HEADS.items() for field in (hidden, *head)]
    return in_dtype(p, dtype, *(own[:3] if name in LISTS else own))


@each_mix
@each_of(FORMS)
def test_float32_takes_the_other_dtype(
    name: str, options: dict[str, Any], dtype: torch.dtype, low: tuple[str, ...]
) -> None:
    """The same bits as by hand, and each gradient in the dtype of its tensor."""
    p = make_problem((2, 5), dtype=torch.float32)
    p = in_dtype(p, dtype, *(low[: len(low) // 2] if name in LISTS else low))
    mixed = with_gradients(fused, name, p, chunk_size=3, **options)
    cast = with_gradients(fused, name, all_low(name, p, dtype), chunk_size=3, **options)
    assert torch.equal(mixed.value, cast.value)
    for field, gradient in mixed.gradients.items():
        assert gradient.dtype == getattr(p, field).dtype
        assert torch.equal(gradient, cast.gradients[field].to(gradient.dtype)), field


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("name", ["linear_logprobs", "policy_gradient", "reverse_kl", "jsd"])
def test_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    """bf16 hidden states with a float32 head, as eager PyTorch would compute it from bf16."""
    p = in_dtype(make_problem((16,), 67, 17, dtype=torch.float32), dtype, "hidden", "teacher_hidden")
    low = all_low(name, p, dtype)
    results = [with_gradients(f, name, q) for f, q in ((fused, p), (eager, low), (eager, low.double()))]
    assert_results_as_accurate(*results, low)
    assert results[0].gradients["weight"].dtype == torch.float32


def test_student_and_teacher_are_cast_apart() -> None:
    p = make_problem((6,), dtype=torch.float32)
    p = in_dtype(p, torch.bfloat16, "hidden", "teacher_hidden", "teacher_weight", "teacher_bias")
    half = in_dtype(p, torch.float16, "teacher_hidden", "teacher_weight", "teacher_bias")
    for q in (p, half):
        cast = in_dtype(q, torch.bfloat16, "weight", "bias")
        assert torch.equal(fused("reverse_kl", q), fused("reverse_kl", cast))


def test_weight_grad_is_summed_in_float32() -> None:
    p = in_dtype(make_problem((6,), dtype=torch.float32), torch.bfloat16, "hidden").leaves()
    buffer = torch.zeros_like(p.weight)
    fused("policy_gradient", p, weight_grad=buffer).backward()
    assert p.weight.grad is None
    again = p.leaves()
    fused("policy_gradient", again).backward()
    torch.testing.assert_close(buffer, again.weight.grad, rtol=2**-7, atol=1e-4)
    assert not torch.equal(buffer, buffer.to(torch.bfloat16).float())


def test_no_gradient_is_needed() -> None:
    p = in_dtype(make_problem((6,), dtype=torch.float32), torch.bfloat16, "hidden")
    cast = in_dtype(p, torch.bfloat16, "weight", "bias")
    top, expected = (linear_top_k(q.hidden, q.weight, 3, bias=q.bias) for q in (p, cast))
    assert torch.equal(top.ids, expected.ids)
    listed = linear_list_logprobs(p.hidden, p.weight, top.ids, bias=p.bias)
    assert torch.equal(listed, expected.logprobs)
    tokens = p.tokens.clamp(min=0)
    ranks = [linear_ranks(q.hidden, q.weight, tokens, bias=q.bias) for q in (p, cast)]
    assert torch.equal(*ranks)


@pytest.mark.parametrize("fields", [("hidden",), ("weight", "teacher_weight")], ids="-".join)
def test_float64_goes_with_float64_alone(fields: tuple[str, ...]) -> None:
    p = in_dtype(make_problem((6,), dtype=torch.float32), torch.float64, *fields)
    for under in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=under), pytest.raises(TypeError, match="float64"):
            fused("reverse_kl", p)


def test_autocast_decides_where_it_is_on() -> None:
    """bf16 and fp16 together have no dtype of their own."""
    p = make_problem((6,), dtype=torch.float32)
    p = in_dtype(in_dtype(p, torch.bfloat16, "hidden"), torch.float16, "weight")
    with pytest.raises(TypeError, match=r"hidden is torch.bfloat16, weight is torch.float16 .*autocast"):
        fused("policy_gradient", p)
    with torch.autocast("cpu", torch.bfloat16):
        value = fused("policy_gradient", p)
    assert torch.equal(value, fused("policy_gradient", in_dtype(p, torch.bfloat16, "weight", "bias")))


def test_one_graph() -> None:
    p = in_dtype(make_problem((6,), dtype=torch.float32), torch.bfloat16, "hidden", "teacher_hidden")

    def loss(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.nn.Parameter) -> torch.Tensor:
        return reverse_kl_loss(hidden, weight, p.teacher_hidden, teacher, reduction="sum").loss

    arguments = p.hidden, p.weight.clone().requires_grad_(), torch.nn.Parameter(p.teacher_weight)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), loss(*arguments))
