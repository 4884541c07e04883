"""The operators under autograd: which plan gives which gradient, and what is kept for the backward pass.

| who needs a gradient, and how           | forward                  | backward                          | GEMMs |
|-----------------------------------------|--------------------------|-----------------------------------|-------|
| nobody                                  | values                   |                                   | 1     |
| `row_values`, hidden only (frozen head) | values and unit gradient | upstream · unit gradient, O(N D)  | 2     |
| `row_values`, weight or bias too        | values                   | logits again, then both gradients | 4     |
| `summed_loss` (slopes known inside)     | values and all gradients | upstream · gradients              | 2, 3  |

(GEMMs of one head; a teacher adds its own forward GEMM.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastkl.kernels.ops import evaluate, evaluate_with_gradients
from fastkl.kernels.problem import Gradients, Inputs, Needs, Objective, Spec
from fastkl.kernels.surrogate import Surrogate


def row_values(
    spec: Spec, inputs: Inputs, active: Tensor | None, graded: Tensor | None, weight_grad: Tensor | None = None
) -> Tensor:
    """Values [K, N] of the `active` rows; the first one is differentiable in the `graded` ones, for any upstream gradient.

    The upstream gradient of other rows is not looked at. `active` None: all rows; `graded` None: the active ones.
    """
    if not _wants_gradient(inputs):
        return evaluate(spec, inputs, active)
    first, values = _RowValues.apply(spec, active, graded, weight_grad, *inputs)
    return torch.cat([first[None], values[1:]])


def summed_loss(
    spec: Spec,
    inputs: Inputs,
    objective: Objective,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ losses (0-dim, differentiable) and the values [K, N] (detached).

    `active` rows (None: all) have values, and those of them that are `graded` (None: the active ones) are in the sum.
    """
    if not _wants_gradient(inputs):
        values = evaluate(spec, inputs, active)
        losses, _ = objective.losses_and_slopes(values)
        counted = active if graded is None else graded
        return (losses if counted is None else losses.where(counted, 0.0)).sum(), values
    tensors = objective.weights, objective.advantages, objective.sampler_logprobs, active, graded, weight_grad
    return cast(tuple[Tensor, Tensor], _SummedLoss.apply(spec, objective.surrogate, *tensors, *inputs))


def _wants_gradient(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3])


def _refuse_double_backward() -> None:
    """Gradients that could be differentiated again would silently lack this operator's part."""
    if torch.is_grad_enabled():  # as it is in a backward pass under create_graph=True, and there alone
        raise RuntimeError(
            "fastkl losses cannot be differentiated twice: call backward or torch.autograd.grad without create_graph=True "
            "(fastkl.reference has each loss in plain PyTorch, which can)"
        )


def _input_gradients(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias as the gradients of all `Inputs`; the others never have one."""
    return *gradients, *[None] * (len(Inputs._fields) - len(gradients))


class _RowValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)
        ctx.spec, ctx.weight_grad, ctx.needs = spec, weight_grad, Needs(*ctx.needs_input_grad[4:7])
        ctx.recompute = ctx.needs.weight or ctx.needs.bias
        if ctx.recompute:
            values = evaluate(spec, inputs, active)
            ctx.save_for_backward(active if graded is None else graded, *inputs)
        else:
            values, _, unit = evaluate_with_gradients(spec, inputs, Objective(), ctx.needs, active, graded)
            ctx.save_for_backward(unit.hidden)
        ctx.mark_non_differentiable(values)
        return values[0].clone(), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if not ctx.recompute:
            (unit,) = ctx.saved_tensors
            return *[None] * 4, *_input_gradients((unit * upstream[:, None]).to(unit.dtype))
        graded, *tensors = ctx.saved_tensors
        inputs = Inputs(*tensors)
        _, _, gradients = evaluate_with_gradients(
            ctx.spec, inputs, Objective(weights=upstream), ctx.needs, graded, None, ctx.weight_grad
        )
        dtype = inputs.weight.dtype
        return *[None] * 4, *_input_gradients(*[None if g is None else g.to(dtype) for g in gradients])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        surrogate: Surrogate | None,
        weights: Tensor | None,
        advantages: Tensor | None,
        sampler_logprobs: Tensor | None,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.spec, ctx.surrogate, ctx.weight_grad = spec, surrogate, weight_grad
        ctx.needs, ctx.dtype = Needs(*ctx.needs_input_grad[8:11]), tensors[1].dtype
        ctx.save_for_backward(weights, advantages, sampler_logprobs, active if graded is None else graded, *tensors)
        objective = Objective(weights, surrogate, advantages, sampler_logprobs)
        values, losses, ctx.gradients = evaluate_with_gradients(
            spec, Inputs(*tensors), objective, ctx.needs, active, graded
        )
        ctx.mark_non_differentiable(values)
        return losses.sum(), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are scaled in place and handed over: a copy would cost a second weight gradient.

        A second backward pass (retain_graph=True) finds them gone and computes them again.
        """
        _refuse_double_backward()
        gradients = ctx.gradients or _SummedLoss._recompute(ctx)
        ctx.gradients = None
        if ctx.weight_grad is not None and gradients.weight is not None:
            ctx.weight_grad.addcmul_(gradients.weight, upstream)
            gradients = gradients._replace(weight=None)
        scaled = [None if g is None else g.mul_(upstream).to(ctx.dtype) for g in gradients]
        return *[None] * 8, *_input_gradients(*scaled)

    @staticmethod
    def _recompute(ctx: Any) -> Gradients:
        weights, advantages, sampler_logprobs, graded, *tensors = ctx.saved_tensors
        objective = Objective(weights, ctx.surrogate, advantages, sampler_logprobs)
        return evaluate_with_gradients(ctx.spec, Inputs(*tensors), objective, ctx.needs, graded)[2]
