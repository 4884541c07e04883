"""The operators under autograd: which plan gives which gradient, and what is kept for the backward pass.

| who needs a gradient, and how           | forward                  | backward                          | GEMMs |
|-----------------------------------------|--------------------------|-----------------------------------|-------|
| nobody                                  | values                   |                                   | 1     |
| `row_losses`, hidden only (frozen head) | values and unit gradient | upstream · unit gradient, O(N D)  | 2     |
| `row_losses`, weight or bias too        | values                   | logits again, then both gradients | 4     |
| `summed_loss` (upstream known inside)   | values and all gradients | upstream · gradients              | 2, 3  |

(GEMMs of one head; a teacher adds its own forward GEMM each time that logits are formed.)

From a subset of a fraction k of the columns, `spec.sparse`, the GEMM of a gradient costs k. `row_losses` then draws it in
the forward pass for a weight too, and keeps what it drew: the backward pass needs no logits. Computed again are blocks of
rows that were computed exactly or that there was no room for. In a graph of torch.compile that is all of them, since the
size of what is kept would have to be known.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import fastkl.kernels.flops  # noqa: F401  for torch.utils.flop_counter, which asks whoever has registered
from fastkl.kernels.operators import evaluate, evaluate_with_gradients, weight_gradients
from fastkl.kernels.problem import Gradients, Inputs, Needs, RowLoss, Spec
from fastkl.kernels.sparse.estimator import Estimates
from fastkl.kernels.surrogate import Surrogate


class Losses(NamedTuple):
    """Losses, differentiable, and what comes with them, detached."""

    losses: Tensor  # [N], or their sum
    values: Tensor  # [K, N]
    statistics: Tensor | None = None  # [2], `ColumnSampler.statistics`, where the forward pass drew the columns


def row_losses(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None = None,
) -> Losses:
    """Losses [N], differentiable for any upstream gradient.

    `active` rows (None: all) have values, and those of them that are `graded` (None: the active ones) have losses.
    """
    if not _wants_gradient(inputs):
        return Losses(*_without_gradient(spec, inputs, row_loss, active, graded))
    found = _RowLosses.apply(spec, *row_loss[3:], *row_loss[:3], active, graded, weight_grad, *inputs)
    return Losses(*cast(tuple[Tensor, ...], found))


def summed_loss(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None = None,
) -> Losses:
    """As `row_losses`, but the losses' sum, 0-dim: its gradients are made in the forward pass."""
    if not _wants_gradient(inputs):
        losses, values = _without_gradient(spec, inputs, row_loss, active, graded)
        return Losses(losses.sum(), values)
    found = _SummedLoss.apply(spec, *row_loss[3:], *row_loss[:3], active, graded, weight_grad, *inputs)
    return Losses(*cast(tuple[Tensor, ...], found))


def _without_gradient(
    spec: Spec, inputs: Inputs, row_loss: RowLoss, active: Tensor | None, graded: Tensor | None
) -> tuple[Tensor, Tensor]:
    values = evaluate(spec, inputs, active)
    losses, *_ = row_loss.losses_and_slopes(values)
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


def _times(unit: Tensor, upstream: Tensor) -> Tensor:
    """The unit gradient [N, D] times each row's upstream value, in its dtype."""
    return (unit * upstream[:, None]).to(unit.dtype)


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
        old_logprobs: Tensor | None,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)
        row_loss = RowLoss(weights, advantages, old_logprobs, surrogate, entropy_coef)
        ctx.needs = Needs(*ctx.needs_input_grad[_OTHERS : _OTHERS + 3])
        ctx.estimates, statistics = None, None
        if not (ctx.needs.weight or ctx.needs.bias):
            values, losses, unit = evaluate_with_gradients(spec, inputs, row_loss, ctx.needs, active, graded)
            ctx.save_for_backward(unit.hidden)
            statistics = unit.statistics
        else:
            ctx.spec, ctx.surrogate, ctx.entropy_coef, ctx.weight_grad = spec, surrogate, entropy_coef, weight_grad
            unit_hidden = None
            if spec.sparse is None or torch.compiler.is_compiling():
                losses, values = _without_gradient(spec, inputs, row_loss, active, graded)
            else:
                ctx.estimates = Estimates(inputs.weight)
                own = Needs(ctx.needs.hidden, weight=False, bias=False)
                values, losses, (unit_hidden, _, _, statistics) = evaluate_with_gradients(
                    spec, inputs, row_loss, own, active, graded, None, ctx.estimates
                )
            _save(ctx, inputs, *row_loss[:3], active if graded is None else graded, unit_hidden)
        found = (losses, values) if statistics is None else (losses, values, statistics)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if not (ctx.needs.weight or ctx.needs.bias):
            (unit,) = ctx.saved_tensors
            return _input_gradients(_times(unit, upstream))
        inputs, (weights, advantages, old_logprobs, graded, unit) = _saved(ctx)
        row_loss = RowLoss(weights, advantages, old_logprobs, ctx.surrogate, ctx.entropy_coef)
        if ctx.estimates is not None:
            gradients = weight_gradients(
                ctx.spec, inputs, row_loss, upstream, ctx.needs, graded, ctx.estimates, ctx.weight_grad
            )
            gradients = gradients._replace(hidden=None if unit is None else _times(unit, upstream))
        else:
            row_loss = row_loss._replace(weights=upstream if weights is None else weights * upstream)
            how = ctx.needs, graded, None, ctx.weight_grad
            gradients = evaluate_with_gradients(ctx.spec, inputs, row_loss, *how)[2]
        return _input_gradients(*[None if g is None else g.to(inputs.weight.dtype) for g in gradients[:3]])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        surrogate: Surrogate | None,
        entropy_coef: float,
        weights: Tensor | None,
        advantages: Tensor | None,
        old_logprobs: Tensor | None,
        active: Tensor | None,
        graded: Tensor | None,
        weight_grad: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)
        row_loss = RowLoss(weights, advantages, old_logprobs, surrogate, entropy_coef)
        ctx.needs, ctx.dtype = Needs(*ctx.needs_input_grad[_OTHERS : _OTHERS + 3]), inputs.weight.dtype
        ctx.spec, ctx.surrogate, ctx.entropy_coef, ctx.weight_grad = spec, surrogate, entropy_coef, weight_grad
        _save(ctx, inputs, *row_loss[:3], active if graded is None else graded)
        values, losses, ctx.gradients = evaluate_with_gradients(spec, inputs, row_loss, ctx.needs, active, graded)
        statistics, ctx.gradients = ctx.gradients.statistics, ctx.gradients._replace(statistics=None)
        found = (losses.sum(), values) if statistics is None else (losses.sum(), values, statistics)
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are scaled in place and handed over: a copy would cost a second weight gradient.

        A second backward pass (retain_graph=True) finds them gone and computes them again.
        """
        _refuse_double_backward()
        gradients = ctx.gradients or _SummedLoss._recompute(ctx)
        ctx.gradients = None
        if ctx.weight_grad is not None and gradients.weight is not None:
            ctx.weight_grad.addcmul_(gradients.weight, upstream)
            gradients = gradients._replace(weight=None)
        return _input_gradients(*[None if g is None else g.mul_(upstream).to(ctx.dtype) for g in gradients[:3]])

    @staticmethod
    def _recompute(ctx: Any) -> Gradients:
        inputs, (weights, advantages, old_logprobs, graded) = _saved(ctx)
        row_loss = RowLoss(weights, advantages, old_logprobs, ctx.surrogate, ctx.entropy_coef)
        return evaluate_with_gradients(ctx.spec, inputs, row_loss, ctx.needs, graded)[2]
