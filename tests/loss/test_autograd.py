"""The losses inside autograd: autocast, checkpointing, second backward passes, shared and changed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from loss_cases import FORMS, LISTS, each_need, each_of, each_way, eager, frozen_or_all, fused
from problem import TRAINABLE, Problem, in_dtype, make_problem
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.lib.measure import peak_allocated
from fastkl.kernels import gemm

COMPOSED = {name: form for name, form in FORMS.items() if name.endswith(("none", "logprobs"))}
forms = each_of(FORMS)
HEAD_FIELDS = ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def summed(name: str, p: Problem, **options: Any) -> Tensor:
    return fused(name, p, **options).sum()


def gradients(p: Problem, fields: tuple[str, ...] = TRAINABLE) -> dict[str, Tensor]:
    return {f: getattr(p, f).grad for f in fields}


@forms
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-hidden", "bf16-hidden"])
def test_autocast_equals_casting(name: str, options: dict[str, Any], inside: bool, dtype: torch.dtype) -> None:
    """As in a mixed-precision step: float32 parameters, hidden states in whichever dtype the last layer gave."""
    p = in_dtype(make_problem((2, 5), dtype=torch.float32), dtype, "hidden", "teacher_hidden").leaves()
    with torch.autocast("cpu", torch.bfloat16):
        value = fused(name, p, chunk_size=3, **options)
        if inside:
            value.sum().backward()
    if not inside:
        value.sum().backward()
    heads = HEAD_FIELDS[:3] if name in LISTS else HEAD_FIELDS
    cast = in_dtype(p.leaves(()), torch.bfloat16, *heads).leaves()
    expected = fused(name, cast, chunk_size=3, **options)
    expected.sum().backward()
    assert torch.equal(value, expected)
    for field, gradient in gradients(p).items():
        assert gradient.dtype == getattr(p, field).dtype
        assert torch.equal(gradient, gradients(cast)[field].to(gradient.dtype)), field


def test_autocast_leaves_float64_alone() -> None:
    p = make_problem()
    with torch.autocast("cpu", torch.bfloat16):
        value = fused("reverse_kl", p)
    assert torch.equal(value, fused("reverse_kl", p))


@forms
@each_need
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpoint(name: str, options: dict[str, Any], use_reentrant: bool, needs: tuple[str, ...]) -> None:
    p = make_problem((2, 5))
    plain = with_gradients(summed, name, p, needs, **options)

    def checkpointed(name: str, p: Problem, **options: Any) -> Tensor:
        def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return fused(name, p._replace(hidden=hidden, weight=weight, bias=bias), **options)

        return checkpoint(head, p.hidden, p.weight, p.bias, use_reentrant=use_reentrant).sum()

    again = with_gradients(checkpointed, name, p, needs, **options)
    torch.testing.assert_close(again, plain)


@forms
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode(name: str, options: dict[str, Any], context: Any) -> None:
    p = make_problem((2, 5))
    with context():
        value = fused(name, p.leaves(), **options)
        assert not value.requires_grad
        torch.testing.assert_close(value.clone(), fused(name, p, **options))
    torch.testing.assert_close(fused(name, p.leaves(), **options), value.clone())  # the same numbers with gradients


@forms
@each_need
def test_second_backward_with_retain_graph(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    p = make_problem((2, 5)).leaves(needs)
    total = summed(name, p, **options)
    tensors = [getattr(p, f) for f in needs]
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()  # an optimizer may do as it likes with what it got
    for ours, expected in zip(torch.autograd.grad(3.0 * total, tensors), kept, strict=True):
        torch.testing.assert_close(ours, 3.0 * expected)


@each_of(FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_rounded_once(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """That of the weight by any upstream gradient: the fp32 sum times it, cast. A second backward pass gives the same."""
    p = make_problem((2, 5), 40, dtype=dtype).leaves()
    total = summed(name, p, **options)
    fields = ("weight", "bias")
    tensors, upstream = [getattr(p, f) for f in fields], torch.tensor(1 / 3, dtype=total.dtype)
    found = [torch.autograd.grad(total, tensors, upstream, retain_graph=True) for _ in range(2)]
    q = p._replace(**{f: getattr(p, f).detach().float() for f in HEAD_FIELDS}).leaves()
    exact = torch.autograd.grad(summed(name, q, **options), [getattr(q, f) for f in fields], upstream)
    for first, second, expected in zip(*found, exact, strict=True):
        assert first.dtype == dtype
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_of_a_trained_head(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The backward pass holds the sum and the gradient in its own dtype, and nothing else of their size."""
    vocabulary, dim = 4000, 64
    monkeypatch.setattr(gemm, "CAST_BYTES", 2**14)
    p = make_problem((10,), vocabulary, dim, dtype=dtype)._replace(bias=None).leaves(("hidden", "weight"))
    total = fused("policy_gradient", p, chunk_size=2)
    handed_over = vocabulary * dim * dtype.itemsize
    peak = peak_allocated(total.backward, torch.device("cpu"))
    assert p.weight.grad.numel() * p.weight.grad.itemsize == handed_over
    assert peak <= (handed_over if dtype == torch.bfloat16 else 0) + 2**16


@forms
@frozen_or_all
def test_gradient_of_a_gradient_is_refused(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Even where the upstream gradient is a constant: what came back would lack this operator's second order."""
    p = make_problem((2, 5)).leaves(needs)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(summed(name, p, **options), p.hidden, create_graph=True)


@each_of(COMPOSED)
def test_weight_changed_before_backward(name: str, options: dict[str, Any]) -> None:
    """The composed form reads the weight again: an optimizer step in between must not pass in silence."""
    p = make_problem().leaves()
    total = summed(name, p, **options)
    with torch.no_grad():
        p.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@each_way
def test_frozen_weight_may_change_before_backward(name: str) -> None:
    """The gradient of the frozen form is made already, with the weight of the forward pass."""
    p = make_problem()
    expected = with_gradients(summed, name, p, ("hidden",)).gradients["hidden"]
    q = p.leaves(("hidden",))
    total = summed(name, q)
    q.weight.mul_(2.0)
    total.backward()
    torch.testing.assert_close(q.hidden.grad, expected)


@forms
def test_weight_tied_to_the_embedding(name: str, options: dict[str, Any]) -> None:
    """One Parameter, two uses: both gradients arrive."""
    p, ids = make_problem((2, 5)), torch.arange(10).reshape(2, 5)
    found = []
    for function in (fused, eager):
        table = torch.nn.Parameter(p.weight.clone())
        hidden = torch.tanh(torch.nn.functional.embedding(ids, table))
        function(name, p._replace(hidden=hidden, weight=table), **options).sum().backward()
        found.append(table.grad)
    torch.testing.assert_close(*found)


@forms
def test_hidden_from_a_graph(name: str, options: dict[str, Any]) -> None:
    """A LoRA step: gradients go through the hidden states into a model, none into the frozen head."""
    p = make_problem((2, 5))
    found = []
    for function in (fused, eager):
        q = p.leaves(())
        adapter = torch.eye(5, dtype=torch.float64).requires_grad_()
        function(name, q._replace(hidden=q.hidden @ adapter), **options).sum().backward()
        assert q.weight.grad is None
        found.append(adapter.grad)
    torch.testing.assert_close(*found)


def test_unused_outputs_of_linear_logprobs() -> None:
    """Only some tokens enter the user's loss; the others' upstream gradient is 0."""
    p = make_problem((6,))
    found = []
    for function in (fused, eager):
        q = p.leaves()
        function("linear_logprobs", q)[2:4].exp().sum().backward()
        found.append(gradients(q))
    torch.testing.assert_close(*found)


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weight_grad_takes_the_gradient_of_the_weight(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Added to what is there, in the dtype of the accumulator: a sum over micro-batches that is rounded nowhere."""
    p = make_problem((2, 5), dtype=dtype)
    expected = with_gradients(summed, name, p, **options).gradients
    q = p.leaves()
    start = torch.ones_like(q.weight, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    buffer = start.clone()
    for factor in (1.0, -0.5):
        (factor * fused(name, q, weight_grad=buffer, **options).sum()).backward()
    assert q.weight.grad is None
    rounding = {} if dtype == torch.float64 else {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(buffer, start + 0.5 * expected["weight"].to(start.dtype), **rounding)
    torch.testing.assert_close(q.hidden.grad, (0.5 * expected["hidden"]).to(dtype), **rounding)


def test_weight_grad_may_be_the_gradient_itself() -> None:
    """weight.grad of a float32 weight that has one: nothing is counted twice."""
    p = make_problem(dtype=torch.float32).leaves()
    fused("policy_gradient", p).backward()
    once = p.weight.grad.clone()
    fused("policy_gradient", p, weight_grad=p.weight.grad).backward()
    torch.testing.assert_close(p.weight.grad, 2 * once)


@forms
def test_forward_mode_is_refused(name: str, options: dict[str, Any]) -> None:
    """It would have lost its tangent in silence."""
    p = make_problem((4,))
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative .*jvp"):
        torch.func.jvp(lambda h: fused(name, p._replace(hidden=h), **options).sum(), (p.hidden,), (p.hidden,))
