"""The sparse backward within the losses: what is computed when, buffers, dtypes, graphs, arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import with_gradients
from largest_tensor import LargestTensor
from loss_cases import each_loss, each_plan, frozen_or_all, fused, fused_output
from problem import make_problem
from sparse_cases import FORMS, SEED, SPARSE, each_form, peaked_problem, relative_error, use_small_blocks
from torch import Tensor

from fastkl.kernels.operators import library
from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.loss import Sparse


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.mark.parametrize("form", ["linear_logprobs", "policy_gradient-none", "reverse_kl-none"])
def test_backward_of_a_trainable_head_makes_no_logits(gemms: dict[str, list[int]], form: str) -> None:
    """The forward pass keeps the sample; without room for it, and for flat blocks, rows are computed again."""
    name, options = FORMS[form]
    p = peaked_problem().leaves()
    value = fused(name, p, backward=Sparse(SEED, error=0.1), **options)
    heads = 2 if name == "reverse_kl" else 1
    assert sum(gemms["project"]) == 64 * heads
    value.sum().backward(retain_graph=True)
    assert sum(gemms["project"]) == 64 * heads
    first = {f: getattr(p, f).grad.clone() for f in ("hidden", "weight", "bias")}
    value.sum().backward()
    for field, gradient in first.items():
        torch.testing.assert_close(getattr(p, field).grad, 2 * gradient)


def test_no_room_for_the_sample(monkeypatch: pytest.MonkeyPatch, gemms: dict[str, list[int]]) -> None:
    original = sparse_estimator.Estimates.__init__

    def little(self: sparse_estimator.Estimates, weight: Tensor) -> None:
        original(self, weight)
        self.room = 3000

    p = peaked_problem()
    expected = with_gradients(fused, "linear_logprobs", p, backward=Sparse(SEED, error=0.01))
    monkeypatch.setattr(sparse_estimator.Estimates, "__init__", little)
    gemms["project"].clear()
    ours = with_gradients(fused, "linear_logprobs", p, backward=Sparse(SEED, error=0.01))
    assert 64 < sum(gemms["project"]) <= 128
    torch.testing.assert_close(ours.gradients["hidden"], expected.gradients["hidden"])
    for field in ("weight", "bias"):
        assert relative_error(ours.gradients[field], expected.gradients[field]) < 0.1


@each_form
def test_gradient_into_a_buffer(name: str, options: dict[str, Any]) -> None:
    p = peaked_problem()
    options = {**options, "backward": Sparse(SEED, error=0.1)}
    expected = with_gradients(fused, name, p, **options).gradients
    buffer, own = torch.ones_like(p.weight), p.leaves()
    value = fused(name, own, weight_grad=buffer, **options)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape) if value.dim() else None
    value.backward(upstream)
    assert own.weight.grad is None
    torch.testing.assert_close(buffer, 1 + expected["weight"])
    torch.testing.assert_close(own.hidden.grad, expected["hidden"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_form
def test_dtypes(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    exact = with_gradients(fused, name, peaked_problem(), **options)
    ours = with_gradients(fused, name, peaked_problem(dtype=dtype), **SPARSE, **options)
    for field, gradient in ours.gradients.items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, exact.gradients[field]) < (0.03 if dtype == torch.bfloat16 else 0.01)


@each_form
@frozen_or_all
def test_no_tensor_of_tokens_by_vocabulary(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], needs: tuple[str, ...]
) -> None:
    for operator in ("_evaluate", "_evaluate_with_gradients"):  # a dispatch mode does not see into an operator
        monkeypatch.setattr(library, operator, getattr(library, operator)._init_fn)
    p = peaked_problem(600, torch.float32).leaves(needs)
    with LargestTensor() as seen:
        fused(name, p, chunk_size=32, **SPARSE, **options).sum().backward()
    assert seen.numel <= 32 * 4000


@each_plan(FORMS)
def test_one_graph(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    p = peaked_problem().leaves(needs)
    tensors = [getattr(p, field) for field in needs]

    def step(seed: int) -> Tensor:
        return fused(name, p, backward=Sparse(seed, error=0.05), **options).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    exact = torch.autograd.grad(fused(name, p, **options).sum(), tensors)
    for seed in (3, 4, 5):
        gradients = torch.autograd.grad(compiled(seed), tensors)
        expected = torch.autograd.grad(step(seed), tensors)
        composed = name == "linear_logprobs" or options.get("reduction") == "none"
        for ours, eager, true in zip(gradients, expected, exact, strict=True):
            if composed and needs != ("hidden",):  # drawn in the backward pass, with the upstream gradient known
                assert relative_error(ours, true) < 0.2
            else:
                torch.testing.assert_close(ours, eager)


def test_nothing_is_drawn_without_a_gradient() -> None:
    output = fused_output("policy_gradient", peaked_problem(), **SPARSE)
    assert "kept_fraction" not in output.metrics


@pytest.mark.parametrize("backward", ["random", "sparse", None])
@each_loss
def test_what_is_no_backward(name: str, backward: Any) -> None:
    with pytest.raises(ValueError, match=f'backward is {backward!r}; use "exact" or Sparse'):
        fused(name, make_problem(), backward=backward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": None}, "seed is None"),
        ({"seed": 1, "error": 0.0}, "error is 0.0"),
        ({"seed": 1, "error": float("nan")}, "error is nan"),
        ({"seed": 1, "threshold": float("inf")}, "threshold is inf"),
        ({"seed": 1, "threshold": 0.1, "error": 0.1}, "error is 0.1 and threshold is 0.1; give one of them"),
    ],
)
def test_what_is_no_sparse_backward(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sparse(**options)
