"""The operators under autograd: which plan gives which gradient, and what is kept for the backward pass.

| who needs a gradient, and how           | forward                  | backward                          | GEMMs |
|-----------------------------------------|--------------------------|-----------------------------------|-------|
| nobody                                  | values                   |                                   | 1     |
| `row_losses`, hidden only (frozen head) | values and unit gradient | upstream · unit gradient, O(N D)  | 2     |
| `row_losses`, weight or bias too        | values                   | logits again, then both gradients | 4     |
| `summed_loss` (upstream known inside)   | values and all gradients | upstream · gradients              | 2, 3  |
| `token_values`, hidden only             | values                   | logits again, then the gradient   | 3     |
| the same, entropies without a gradient  | values and unit gradient | two products over [N, D]          | 2     |
| `token_values`, weight or bias too      | values                   | logits again, then both gradients | 4     |

(GEMMs of one head; a teacher adds its own forward GEMM each time that logits are formed.)

Log-prob and lse need one unit gradient: lse = z[y] − log p[y], and the gradient of z[y] is a row of the weight. That of
the entropy is a product of its own: three with the logits, whether they are made in forward or in backward.

From a subset of a fraction k of the columns, `spec.sparse`, the GEMM of a gradient costs k. `row_losses` then draws it in
the forward pass for a weight too, and keeps what it drew: the backward pass needs no logits. Computed again are blocks of
rows that were computed exactly or that there was no room for. In a graph of torch.compile that is all of them, since the
size of what is kept would have to be known.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import fastkl.kernels.operators.flops  # noqa: F401  for torch.utils.flop_counter, which asks whoever has registered
from fastkl.kernels.gemm import scaled_into, scaled_rows
from fastkl.kernels.operators.library import evaluate, evaluate_with_gradients, weight_gradients
from fastkl.kernels.operators.records import pack, unpack
from fastkl.kernels.problem import Gradients, Inputs, Needs, Problem, RowLoss, Rows
from fastkl.kernels.sparse.estimator import Estimates


class Losses(NamedTuple):
    """Losses, differentiable, and what comes with them, detached."""

    losses: Tensor  # [N], or their sum
    values: Tensor  # [K, N]
    statistics: Tensor | None = None  # [2], `ColumnSampler.statistics`, of a sparse backward drawn in the forward pass


class TokenValues(NamedTuple):
    """What kind "token_nll_entropy" says of each token, [N] each."""

    nll: Tensor
    entropies: Tensor
    lse: Tensor
    gap: Tensor  # max z − z[y], which has no gradient

    @classmethod
    def of(cls, values: Tensor) -> TokenValues:
        nll, entropies, m, above, gap = values
        return cls(nll, entropies, m + above, gap)


def row_losses(problem: Problem, weight_grad: Tensor | None = None) -> Losses:
    """Losses [N], differentiable for any upstream gradient."""
    if not _wants_gradient(problem.inputs):
        return Losses(*_without_gradient(problem))
    return Losses(*_apply(_RowLosses, problem, weight_grad))


def summed_loss(problem: Problem, weight_grad: Tensor | None = None) -> Losses:
    """As `row_losses`, but the losses' sum, 0-dim: its gradients are made in the forward pass."""
    if not _wants_gradient(problem.inputs):
        losses, values = _without_gradient(problem)
        return Losses(losses.sum(), values)
    return Losses(*_apply(_SummedLoss, problem, weight_grad))


def token_values(problem: Problem, weight_grad: Tensor | None = None, entropy_gradient: bool = True) -> TokenValues:
    """Differentiable for any upstream gradients, the entropies if `entropy_gradient`.

    A weight of 0 in the row loss leaves a row out; other weights say nothing here.
    """
    inputs = problem.inputs
    if not _wants_gradient(inputs):
        return TokenValues.of(evaluate(problem))
    head_is_frozen = not inputs.weight.requires_grad and (inputs.bias is None or not inputs.bias.requires_grad)
    kept = head_is_frozen and not entropy_gradient and problem.spec.share is None  # W[y] may be another process's
    values = TokenValues(*_apply(_UnitTokenValues if kept else _TokenValues, problem, weight_grad))
    return values if entropy_gradient else values._replace(entropies=values.entropies.detach())


def _without_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    values = evaluate(problem)
    losses, *_ = problem.row_loss.losses_and_slopes(values)
    counted = problem.rows.counted
    return losses if counted is None else losses.where(counted, 0.0), values


def _wants_gradient(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3])


def _apply(function: Any, problem: Problem, weight_grad: Tensor | None) -> tuple[Tensor, ...]:
    """Autograd sees each tensor of the problem as an argument: hidden, weight and bias come first."""
    tensors, *others = pack(problem)
    return cast(tuple[Tensor, ...], function.apply(others, weight_grad, *tensors))


def _refuse_double_backward() -> None:
    """Gradients that could be differentiated again would silently lack this operator's part."""
    if torch.is_grad_enabled():  # as it is in a backward pass under create_graph=True, and there alone
        raise RuntimeError(
            "fastkl losses cannot be differentiated twice: call backward or torch.autograd.grad without create_graph=True "
            "(fastkl.reference has each loss in plain PyTorch, which can)"
        )


def _begin(ctx: Any, others: list[Any], tensors: tuple[Any, ...]) -> Problem:
    """The problem that `_apply` packed, and which gradients of it are wanted."""
    ctx.others = others
    ctx.needs = Needs(*ctx.needs_input_grad[2:5])  # after others and weight_grad
    return cast(Problem, unpack((Problem,), tensors, *others)[0])


def _save(ctx: Any, tensors: tuple[Any, ...], *results: Tensor | None) -> None:
    """Saves the tensors of a problem, one of which may be a function, and results for the backward pass."""
    ctx.functions = {i: tensor for i, tensor in enumerate(tensors) if callable(tensor)}
    ctx.count = len(tensors)
    ctx.save_for_backward(*(None if callable(tensor) else tensor for tensor in tensors), *results)


def _saved(ctx: Any) -> tuple[Problem, tuple[Tensor | None, ...]]:
    tensors = [ctx.functions.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]
    return unpack((Problem,), tensors[: ctx.count], *ctx.others)[0], tuple(tensors[ctx.count :])


def _results(ctx: Any, losses: Tensor, values: Tensor, statistics: Tensor | None) -> tuple[Tensor, ...]:
    results = (losses, values) if statistics is None else (losses, values, statistics)
    ctx.mark_non_differentiable(*results[1:])
    return results


def _input_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias as those of all arguments; the others never have one."""
    return None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 2 - len(gradients))


def _times(unit: Tensor, upstream: Tensor) -> Tensor:
    """The unit gradient [N, D] times each row's upstream value, in its dtype."""
    return torch.mul(unit, upstream[:, None], out=torch.empty_like(unit))


def _finished(gradient: Tensor | None, upstream: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A gradient times `upstream`, 0-dim, in the dtype of its input: in place, or in one pass over it."""
    if gradient is None:
        return None
    if gradient.dtype == dtype:
        return gradient.mul_(upstream)
    return scaled_into(torch.empty_like(gradient, dtype=dtype), gradient, upstream.reshape(1))


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], weight_grad: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        problem = _begin(ctx, others, tensors)
        ctx.weight_grad, ctx.estimates = weight_grad, None
        if not (ctx.needs.weight or ctx.needs.bias):
            values, losses, unit = evaluate_with_gradients(problem, ctx.needs)
            ctx.save_for_backward(unit.hidden)
            return _results(ctx, losses, values, unit.statistics)
        unit_hidden, statistics = None, None
        if problem.spec.sparse is None or torch.compiler.is_compiling():
            losses, values = _without_gradient(problem)
        else:
            ctx.estimates = Estimates(problem.inputs.weight)
            now = Needs(ctx.needs.hidden, weight=False, bias=False)
            values, losses, unit = evaluate_with_gradients(problem, now, estimates=ctx.estimates)
            unit_hidden, statistics = unit.hidden, unit.statistics
        _save(ctx, tensors, unit_hidden)
        return _results(ctx, losses, values, statistics)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        if not (ctx.needs.weight or ctx.needs.bias):
            (unit,) = ctx.saved_tensors
            return _input_gradients(ctx, _times(unit, upstream))
        problem, (unit_hidden,) = _saved(ctx)
        if ctx.estimates is not None:
            gradients = weight_gradients(problem, upstream, ctx.needs, ctx.estimates, ctx.weight_grad)
            gradients = gradients._replace(hidden=None if unit_hidden is None else _times(unit_hidden, upstream))
        else:
            row_loss = problem.row_loss.times(upstream)
            problem = problem._replace(row_loss=row_loss, rows=Rows(problem.rows.counted))
            gradients = evaluate_with_gradients(problem, ctx.needs, ctx.weight_grad)[2]
        dtype = problem.inputs.weight.dtype
        return _input_gradients(ctx, *[None if g is None else g.to(dtype) for g in gradients[:3]])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], weight_grad: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        problem = _begin(ctx, others, tensors)
        ctx.weight_grad, ctx.dtype = weight_grad, problem.inputs.weight.dtype
        _save(ctx, tensors)
        values, losses, ctx.gradients = evaluate_with_gradients(problem, ctx.needs)
        statistics, ctx.gradients = ctx.gradients.statistics, ctx.gradients._replace(statistics=None)
        return _results(ctx, losses.sum(), values, statistics)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are scaled in place and handed over, or cast: a copy would cost a second weight gradient.

        A second backward pass (retain_graph=True) finds them gone and computes them again.
        """
        _refuse_double_backward()
        gradients = ctx.gradients or _SummedLoss._recompute(ctx)
        ctx.gradients = None
        if ctx.weight_grad is not None and gradients.weight is not None:
            ctx.weight_grad.addcmul_(gradients.weight, upstream)
            gradients = gradients._replace(weight=None)
        return _input_gradients(ctx, *[_finished(gradient, upstream, ctx.dtype) for gradient in gradients[:3]])

    @staticmethod
    def _recompute(ctx: Any) -> Gradients:
        problem, _ = _saved(ctx)
        problem = problem._replace(rows=Rows(problem.rows.counted))
        return evaluate_with_gradients(problem, ctx.needs)[2]


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, others: list[Any], weight_grad: Tensor | None, *tensors: Any) -> TokenValues:
        problem = _begin(ctx, others, tensors)
        ctx.weight_grad = weight_grad
        _save(ctx, tensors)
        return _token_values(ctx, evaluate(problem))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        some = [g for g in upstream[:3] if g is not None]
        if not some:
            return _input_gradients(ctx, None, None, None)
        slopes = torch.stack([torch.zeros_like(some[0]) if g is None else g for g in upstream[:3]])
        problem, _ = _saved(ctx)
        problem = problem._replace(row_loss=RowLoss(slopes=slopes), rows=Rows(problem.rows.counted))
        gradients, dtype = evaluate_with_gradients(problem, ctx.needs, ctx.weight_grad)[2], problem.inputs.weight.dtype
        return _input_gradients(ctx, *[None if g is None else g.to(dtype) for g in gradients[:3]])


class _UnitTokenValues(torch.autograd.Function):
    """Of a frozen head, the entropies without a gradient: d lse = d(−log p[y]) + d z[y]."""

    @staticmethod
    def forward(ctx: Any, others: list[Any], weight_grad: Tensor | None, *tensors: Any) -> TokenValues:
        problem = _begin(ctx, others, tensors)
        values, _, unit = evaluate_with_gradients(problem, ctx.needs)
        head = problem.spec.student
        slope = torch.full_like(values[0], head.alpha)
        if head.cap is not None:
            slope = slope * (head.cap - (values[2] - values[4]).square() / head.cap)  # z[y] by its scaled score
        ctx.save_for_backward(unit.hidden, problem.inputs.weight, problem.inputs.tokens, slope)
        return _token_values(ctx, values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_double_backward()
        by_nll, _, by_lse, _ = upstream
        some = [g for g in (by_nll, by_lse) if g is not None]
        if not some:
            return _input_gradients(ctx, None)
        unit, weight, tokens, slope = ctx.saved_tensors
        gradient = unit * torch.stack(some).sum(0)[:, None]
        if by_lse is not None:
            gradient = gradient + scaled_rows(weight[tokens], torch.where(by_lse == 0, 0.0, by_lse * slope))
        return _input_gradients(ctx, gradient.to(unit.dtype))


def _token_values(ctx: Any, values: Tensor) -> TokenValues:
    found = TokenValues.of(values)
    ctx.mark_non_differentiable(found.gap)
    ctx.set_materialize_grads(False)
    return found
