"""The operators under autograd: which plan gives which gradient, and what is kept for the backward pass.

| who needs a gradient, and how           | forward                  | backward                          | GEMMs |
|-----------------------------------------|--------------------------|-----------------------------------|-------|
| nobody                                  | values                   |                                   | 1     |
| `row_losses`, hidden only (frozen head) | values and unit gradient | upstream · unit gradient, O(N D)  | 2     |
| `row_losses`, weight or bias too        | values                   | logits again, then both gradients | 4     |
| `summed_loss` (upstream known inside)   | values and all gradients | upstream · gradients              | 2, 3  |

(GEMMs of one head; a teacher adds its own forward GEMM.)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

import fastkl.kernels.flops  # noqa: F401  for torch.utils.flop_counter, which asks whoever has registered
from fastkl.kernels.ops import evaluate, evaluate_with_gradients
from fastkl.kernels.problem import Gradients, Inputs, Needs, Objective, Spec
from fastkl.kernels.surrogate import Surrogate


def row_losses(
    spec: Spec,
    inputs: Inputs,
    objective: Objective,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [N], differentiable for any upstream gradient, and the values [K, N] (detached).

    `active` rows (None: all) have values, and those of them that are `graded` (None: the active ones) have losses.
    """
    if not _wants_gradient(inputs):
        return _without_gradient(spec, inputs, objective, active, graded)
    return cast(
        tuple[Tensor, Tensor],
        _RowLosses.apply(spec, *objective[3:], *objective[:3], active, graded, weight_grad, *inputs),
    )


def summed_loss(
    spec: Spec,
    inputs: Inputs,
    objective: Objective,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `row_losses`, but the losses' sum, 0-dim: its gradients are made in the forward pass."""
    if not _wants_gradient(inputs):
        losses, values = _without_gradient(spec, inputs, objective, active, graded)
        return losses.sum(), values
    return cast(
        tuple[Tensor, Tensor],
        _SummedLoss.apply(spec, *objective[3:], *objective[:3], active, graded, weight_grad, *inputs),
    )


def _without_gradient(
    spec: Spec, inputs: Inputs, objective: Objective, active: Tensor | None, graded: Tensor | None
) -> tuple[Tensor, Tensor]:
    values = evaluate(spec, inputs, active)
    losses, *_ = objective.losses_and_slopes(values)
    counted = active if graded is None else graded
    return losses if counted is None else losses.where(counted, 0.0), values


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
    """The gradients of hidden, weight and bias as those of all arguments; the others never have one."""
    return *[None] * _OTHERS, *gradients, *[None] * (len(Inputs._fields) - len(gradients))


def _save(ctx: Any, inputs: Inputs, *others: Tensor | None) -> None:
    """Saves the inputs, among which a function is no tensor, and others for the backward pass."""
    ctx.teacher_chunks = inputs.teacher_logits if callable(inputs.teacher_logits) else None
    tensors = inputs if ctx.teacher_chunks is None else inputs._replace(teacher_logits=None)
    ctx.save_for_backward(*tensors, *others)


def _saved(ctx: Any) -> tuple[Inputs, tuple[Tensor | None, ...]]:
    count, tensors = len(Inputs._fields), ctx.saved_tensors
    inputs = Inputs(*tensors[:count])
    if ctx.teacher_chunks is not None:
        inputs = inputs._replace(teacher_logits=ctx.teacher_chunks)
    return inputs, tensors[count:]


_OTHERS = 9  # arguments of the functions below that come before the inputs


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        surrogate: Surrogate | None,
        entropy_coef: float,
        weights: Tensor | None,
        advantages: Tensor | None,
        sampler_logprobs: Tensor | None,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)
        objective = Objective(weights, advantages, sampler_logprobs, surrogate, entropy_coef)
        ctx.needs = Needs(*ctx.needs_input_grad[_OTHERS : _OTHERS + 3])
        ctx.recompute = ctx.needs.weight or ctx.needs.bias
        if ctx.recompute:
            losses, values = _without_gradient(spec, inputs, objective, active, graded)
            ctx.spec, ctx.surrogate, ctx.entropy_coef, ctx.weight_grad = spec, surrogate, entropy_coef, weight_grad
            _save(ctx, inputs, *objective[:3], active if graded is None else graded)
        else:
            values, losses, unit = evaluate_with_gradients(spec, inputs, objective, ctx.needs, active, graded)
            ctx.save_for_backward(unit.hidden)
        ctx.mark_non_differentiable(values)
        return losses, values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if not ctx.recompute:
            (unit,) = ctx.saved_tensors
            return _input_gradients((unit * upstream[:, None]).to(unit.dtype))
        inputs, (weights, advantages, sampler_logprobs, graded) = _saved(ctx)
        weights = upstream if weights is None else weights * upstream
        objective = Objective(weights, advantages, sampler_logprobs, ctx.surrogate, ctx.entropy_coef)
        _, _, gradients = evaluate_with_gradients(ctx.spec, inputs, objective, ctx.needs, graded, None, ctx.weight_grad)
        return _input_gradients(*[None if g is None else g.to(inputs.weight.dtype) for g in gradients])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        surrogate: Surrogate | None,
        entropy_coef: float,
        weights: Tensor | None,
        advantages: Tensor | None,
        sampler_logprobs: Tensor | None,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)
        objective = Objective(weights, advantages, sampler_logprobs, surrogate, entropy_coef)
        ctx.needs, ctx.dtype = Needs(*ctx.needs_input_grad[_OTHERS : _OTHERS + 3]), inputs.weight.dtype
        ctx.spec, ctx.surrogate, ctx.entropy_coef, ctx.weight_grad = spec, surrogate, entropy_coef, weight_grad
        _save(ctx, inputs, *objective[:3], active if graded is None else graded)
        values, losses, ctx.gradients = evaluate_with_gradients(spec, inputs, objective, ctx.needs, active, graded)
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
        return _input_gradients(*[None if g is None else g.mul_(upstream).to(ctx.dtype) for g in gradients])

    @staticmethod
    def _recompute(ctx: Any) -> Gradients:
        inputs, (weights, advantages, sampler_logprobs, graded) = _saved(ctx)
        objective = Objective(weights, advantages, sampler_logprobs, ctx.surrogate, ctx.entropy_coef)
        return evaluate_with_gradients(ctx.spec, inputs, objective, ctx.needs, graded)[2]
