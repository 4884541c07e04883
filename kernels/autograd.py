"""The driver under autograd: which plan gives which gradient, and what is kept for the backward pass.

| who needs a gradient, and how           | forward                  | backward                          | GEMMs |
|-----------------------------------------|--------------------------|-----------------------------------|-------|
| nobody                                  | values                   |                                   | 1     |
| `row_values`, hidden only (frozen head) | values and unit gradient | upstream · unit gradient, O(N D)  | 2     |
| `row_values`, weight or bias too        | values                   | logits again, then both gradients | 4     |
| `summed_loss` (slopes known inside)     | values and all gradients | upstream · gradients              | 2, 3  |

(GEMMs of one head; a teacher adds its own forward GEMM.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fastkl.kernels.driver import Inputs, Needs, Spec, evaluate, evaluate_with_gradients
from fastkl.kernels.gemm import compute_dtype

# (values of a chunk [K, n], its rows) -> the rows' losses [n] and d loss / d values[0] [n], both in the compute dtype.
Objective = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def row_values(spec: Spec, inputs: Inputs, limit: int | None) -> Tensor:
    """Values [K, N]; the first row is differentiable, under any upstream gradient."""
    if not _wants_gradient(inputs):
        return evaluate(spec, inputs, limit)
    first, values = _RowValues.apply(spec, limit, *inputs)
    return torch.cat([first[None], values[1:]])


def summed_loss(spec: Spec, inputs: Inputs, objective: Objective, limit: int | None) -> tuple[Tensor, Tensor]:
    """Σ losses (0-dim, differentiable) and the values [K, N] (detached)."""
    if not _wants_gradient(inputs):
        values = evaluate(spec, inputs, limit)
        return objective(values, slice(0, values.shape[1]))[0].sum(), values
    return cast(tuple[Tensor, Tensor], _SummedLoss.apply(spec, objective, limit, *inputs))


def _wants_gradient(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3])


def _refuse_double_backward() -> None:
    """Gradients that could be differentiated again would silently lack this operator's part."""
    if torch.is_grad_enabled():  # as it is in a backward pass under create_graph=True, and there alone
        raise RuntimeError(
            "fastkl losses cannot be differentiated twice: call backward or torch.autograd.grad without create_graph=True "
            "(fastkl.reference has each loss in plain PyTorch, which can)"
        )


def _gradients(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias as the gradients of all `Inputs`; the others never have one."""
    return *gradients, *[None] * (len(Inputs._fields) - len(gradients))


class _RowValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, limit: int | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs = Inputs(*tensors)
        ctx.spec, ctx.limit, ctx.needs = spec, limit, Needs(*ctx.needs_input_grad[2:5])
        ctx.recompute = ctx.needs.weight or ctx.needs.bias
        if ctx.recompute:
            values = evaluate(spec, inputs, limit)
            ctx.save_for_backward(*inputs)
        else:
            values, unit = evaluate_with_gradients(spec, inputs, None, ctx.needs, limit)
            ctx.save_for_backward(unit.hidden)
        ctx.mark_non_differentiable(values)
        return values[0].clone(), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if not ctx.recompute:
            (unit,) = ctx.saved_tensors
            return None, None, *_gradients((unit * upstream[:, None]).to(unit.dtype))
        inputs = Inputs(*ctx.saved_tensors)
        _, gradients = evaluate_with_gradients(ctx.spec, inputs, lambda _, rows: upstream[rows], ctx.needs, ctx.limit)
        dtype = inputs.weight.dtype
        return None, None, *_gradients(*[None if g is None else g.to(dtype) for g in gradients])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: Spec, objective: Objective, limit: int | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, needs = Inputs(*tensors), Needs(*ctx.needs_input_grad[3:6])
        losses = inputs.hidden.new_zeros(inputs.hidden.shape[0], dtype=compute_dtype(inputs.hidden.dtype))

        def slopes(values: Tensor, rows: slice) -> Tensor:
            losses[rows], slope = objective(values, rows)
            return slope

        values, ctx.gradients = evaluate_with_gradients(spec, inputs, slopes, needs, limit)
        ctx.recompute = lambda again: evaluate_with_gradients(
            spec, again, lambda v, r: objective(v, r)[1], needs, limit
        )
        ctx.dtype = inputs.weight.dtype
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(values)
        return losses.sum(), values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are scaled in place and handed over: a copy would cost a second weight gradient.

        A second backward pass (retain_graph=True) finds them gone and computes them again.
        """
        _refuse_double_backward()
        gradients = ctx.gradients or ctx.recompute(Inputs(*ctx.saved_tensors))[1]
        ctx.gradients = None
        scaled = [None if g is None else g.mul_(upstream).to(ctx.dtype) for g in gradients]
        return None, None, None, *_gradients(*scaled)
