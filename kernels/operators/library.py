"""The driver as two torch operators, `fastkl::evaluate` and `fastkl::evaluate_with_gradients`.

As operators they are opaque to torch.compile: a training step around them is one graph, and only shapes are known of
them. An operator takes tensors, numbers and strings, so `records.py` packs a problem on the way in. Rows that take no part
are left out here, before the driver sees them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastkl.kernels import driver
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.operators.records import pack, unpack
from fastkl.kernels.problem import Gradients, Needs, Problem
from fastkl.kernels.sparse.estimator import Estimates


def evaluate(problem: Problem) -> Tensor:
    """Values [K, N] in the compute dtype; 0 in rows that are not active."""
    if callable(problem.inputs.teacher_logits):
        return _values(problem)
    return cast(Tensor, _evaluate(*pack(problem)))


def evaluate_with_gradients(
    problem: Problem, needs: Needs, weight_grad: Tensor | None = None, estimates: Estimates | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """Values [K, N] of the active rows, losses [N] of the graded ones, and the gradients of their sum; 0 elsewhere.

    Where `weight_grad` is given, the weight's gradient is added to it and not returned. `estimates` are filled for
    `weight_gradients`.
    """
    if weight_grad is not None or estimates is not None or callable(problem.inputs.teacher_logits):
        values, losses, gradients = _with_gradients(problem, needs, weight_grad, estimates)  # nothing for an operator
        return values, losses, gradients if weight_grad is None else gradients._replace(weight=None)
    values, losses, *tensors = _evaluate_with_gradients(*pack(problem, needs))
    gradients = iter(tensors)
    wanted = *needs, problem.spec.sparse is not None
    return values, losses, Gradients(*(next(gradients) if is_wanted else None for is_wanted in wanted))


def weight_gradients(
    problem: Problem, upstream: Tensor, needs: Needs, estimates: Estimates, weight_grad: Tensor | None
) -> Gradients:
    """Gradients of weight and bias, times `upstream` [N], from the estimates of a forward pass on the same rows."""
    index = _indices(problem.rows.counted)
    upstream = upstream if index is None else upstream[index]
    inputs, row_loss = problem.inputs.take(index), problem.row_loss.take(index)
    gradients = driver.weight_gradients(problem.spec, inputs, row_loss, upstream, needs, estimates, weight_grad)
    return gradients if weight_grad is None else gradients._replace(weight=None)


@torch.library.custom_op("fastkl::evaluate", mutates_args=())
def _evaluate(tensors: list[Tensor | None], numbers: list[float], integers: list[int], words: str) -> Tensor:
    (problem,) = unpack((Problem,), tensors, numbers, integers, words)
    return _values(problem)


@_evaluate.register_fake
def _(*packed: Any) -> Tensor:
    (problem,) = unpack((Problem,), *packed)
    return _fake_values(problem)


@torch.library.custom_op("fastkl::evaluate_with_gradients", mutates_args=())
def _evaluate_with_gradients(
    tensors: list[Tensor | None], numbers: list[float], integers: list[int], words: str
) -> list[Tensor]:
    problem, needs = unpack((Problem, Needs), tensors, numbers, integers, words)
    values, losses, gradients = _with_gradients(problem, needs)
    return [values, losses, *(g for g in gradients if g is not None)]


@_evaluate_with_gradients.register_fake
def _(*packed: Any) -> list[Tensor]:
    problem, needs = unpack((Problem, Needs), *packed)
    hidden, weight = problem.inputs.hidden, problem.inputs.weight
    values = _fake_values(problem)
    results = [values, torch.empty_like(values[0])]
    if needs.hidden:
        results.append(torch.empty_like(hidden, memory_format=torch.contiguous_format))
    if needs.weight:
        results.append(values.new_empty(weight.shape))
    if needs.bias:
        results.append(values.new_empty(weight.shape[0]))
    if problem.spec.sparse is not None:
        results.append(values.new_empty(2))
    return results


def _fake_values(problem: Problem) -> Tensor:
    hidden = problem.inputs.hidden
    return hidden.new_empty(problem.spec.outputs, hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _values(problem: Problem) -> Tensor:
    """The driver on the active rows."""
    index, inputs = _indices(problem.rows.active), problem.inputs
    return _scatter(driver.evaluate(problem.spec, inputs.take(index)), index, inputs.hidden.shape[0])


def _with_gradients(
    problem: Problem, needs: Needs, weight_grad: Tensor | None = None, estimates: Estimates | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """The driver with gradients on the graded rows, and without on the other active ones."""
    inputs, spec, row_loss, (active, graded) = problem
    n, index = inputs.hidden.shape[0], _indices(problem.rows.counted)
    values, losses, gradients = driver.evaluate_with_gradients(
        spec, inputs.take(index), row_loss.take(index), needs, weight_grad, estimates
    )
    values, losses = _scatter(values, index, n), _scatter(losses, index, n)
    if index is not None and active is not None and graded is not None:
        rest = (active & ~graded).nonzero().squeeze(1)
        if rest.numel() > 0:
            values[:, rest] = driver.evaluate(spec, inputs.take(rest))
    if gradients.hidden is not None and index is not None:
        scattered = torch.zeros_like(inputs.hidden).index_copy_(0, index, gradients.hidden)
        gradients = gradients._replace(hidden=scattered)
    return values, losses, gradients


def _indices(rows: Tensor | None) -> Tensor | None:
    """Indices [n] of the rows that are set (bool [N]), or None for all of them; a synchronisation on an accelerator."""
    if rows is None:
        return None
    index = rows.nonzero().squeeze(1)
    return None if index.numel() == rows.numel() else index


def _scatter(rows: Tensor, index: Tensor | None, n: int) -> Tensor:
    """Entries [..., n'] of the rows of `index` among [..., n]; 0 for the rows that were left out."""
    return rows if index is None else rows.new_zeros(*rows.shape[:-1], n).index_copy_(-1, index, rows)
