"""The driver as two torch operators, `fastkl::evaluate` and `fastkl::evaluate_with_gradients`.

As operators they are opaque to torch.compile: a training step around them is one graph, and only shapes are known of
them. An operator takes tensors, numbers and strings, so that the records of `problem.py` are packed on the way in and
unpacked inside. Rows that take no part are left out here, before the driver sees them.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastkl.kernels import driver
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.problem import (
    Backend,
    Gradients,
    HeadOptions,
    Inputs,
    Kind,
    Needs,
    RowLoss,
    Spec,
)
from fastkl.kernels.sparse.estimator import Estimates, Sparse
from fastkl.kernels.surrogate import Method, Surrogate


def evaluate(spec: Spec, inputs: Inputs, active: Tensor | None = None) -> Tensor:
    """Values [K, N] in the compute dtype; 0 in rows that are not `active` (bool [N]; None: all are)."""
    if callable(inputs.teacher_logits):
        return _values_of(spec, inputs, active)
    return cast(Tensor, _evaluate(list(inputs), active, *_pack_spec(spec)))


def evaluate_with_gradients(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    needs: Needs,
    active: Tensor | None = None,
    graded: Tensor | None = None,
    weight_grad: Tensor | None = None,
    estimates: Estimates | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Values [K, N], losses [N], and the gradients of their sum.

    Rows that are active but not `graded` (bool [N]; None: the active ones are) have values and no part in losses and
    gradients. Where `weight_grad` is given, the weight's gradient is added to it and not returned. `estimates` are filled
    for `weight_gradients`.
    """
    if weight_grad is not None or estimates is not None or callable(inputs.teacher_logits):  # nothing for an operator
        values, losses, gradients = _on_rows(spec, inputs, row_loss, needs, active, graded, weight_grad, estimates)
        return values, losses, gradients if weight_grad is None else gradients._replace(weight=None)
    values, losses, *found = _evaluate_with_gradients(
        list(inputs),
        active,
        graded,
        list(row_loss[:3]),
        *_pack_surrogate(row_loss.surrogate),
        row_loss.entropy_coef,
        list(needs),
        *_pack_spec(spec),
    )
    tensors = iter(found)
    wanted = *needs, spec.sparse is not None
    return values, losses, Gradients(*(next(tensors) if one else None for one in wanted))


def weight_gradients(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    upstream: Tensor,
    needs: Needs,
    graded: Tensor | None,
    estimates: Estimates,
    weight_grad: Tensor | None,
) -> Gradients:
    """Gradients of weight and bias, times `upstream` [N], from the estimates of a forward pass on the same rows."""
    index = _rows_of(graded)
    own = upstream if index is None else upstream[index]
    problem = spec, inputs.take(index), row_loss.take(index)
    gradients = driver.weight_gradients(*problem, own, needs, estimates, weight_grad)
    return gradients if weight_grad is None else gradients._replace(weight=None)


@torch.library.custom_op("fastkl::evaluate", mutates_args=())
def _evaluate(
    inputs: list[Tensor | None],
    active: Tensor | None,
    kind: str,
    heads: list[float],
    backend: str,
    chunk_size: int | None,
    variant: str,
    parameter: float,
    extras: bool,
    sparse: list[float],
    seed: int,
) -> Tensor:
    spec = _unpack_spec(kind, heads, backend, chunk_size, variant, parameter, extras, sparse, seed)
    return _values_of(spec, _unpack_inputs(inputs), active)


@_evaluate.register_fake
def _(inputs: list[Tensor | None], active: Tensor | None, *spec: Any) -> Tensor:
    return _fake_values(_unpack_inputs(inputs), _unpack_spec(*spec))


@torch.library.custom_op("fastkl::evaluate_with_gradients", mutates_args=())
def _evaluate_with_gradients(
    inputs: list[Tensor | None],
    active: Tensor | None,
    graded: Tensor | None,
    row_loss: list[Tensor | None],
    method: str,
    clips: list[float],
    entropy_coef: float,
    needs: list[bool],
    kind: str,
    heads: list[float],
    backend: str,
    chunk_size: int | None,
    variant: str,
    parameter: float,
    extras: bool,
    sparse: list[float],
    seed: int,
) -> list[Tensor]:
    weights, advantages, old_logprobs = row_loss
    terms = RowLoss(weights, advantages, old_logprobs, _unpack_surrogate(method, clips), entropy_coef)
    spec = _unpack_spec(kind, heads, backend, chunk_size, variant, parameter, extras, sparse, seed)
    values, losses, gradients = _on_rows(spec, _unpack_inputs(inputs), terms, Needs(*needs), active, graded, None)
    return [values, losses, *(g for g in gradients if g is not None)]


def _values_of(spec: Spec, inputs: Inputs, active: Tensor | None) -> Tensor:
    """The driver on the active rows."""
    index = _rows_of(active)
    return _scatter(driver.evaluate(spec, inputs.take(index)), index, inputs.hidden.shape[0])


def _on_rows(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    needs: Needs,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None,
    estimates: Estimates | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """The driver with gradients on the graded rows, and without on the other active ones."""
    n, index = inputs.hidden.shape[0], _rows_of(active if graded is None else graded)
    values, losses, gradients = driver.evaluate_with_gradients(
        spec, inputs.take(index), row_loss.take(index), needs, weight_grad, estimates
    )
    values, losses = _scatter(values, index, n), _scatter(losses, index, n)
    if index is not None and active is not None and graded is not None:
        rest = (active & ~graded).nonzero().squeeze(1)
        values[:, rest] = driver.evaluate(spec, inputs.take(rest))
    if gradients.hidden is not None and index is not None:
        scattered = torch.zeros_like(inputs.hidden).index_copy_(0, index, gradients.hidden)
        gradients = gradients._replace(hidden=scattered)
    return values, losses, gradients


@_evaluate_with_gradients.register_fake
def _(
    inputs: list[Tensor | None],
    active: Tensor | None,
    graded: Tensor | None,
    row_loss: list[Tensor | None],
    method: str,
    clips: list[float],
    entropy_coef: float,
    needs: list[bool],
    *packed: Any,
) -> list[Tensor]:
    problem, spec = _unpack_inputs(inputs), _unpack_spec(*packed)
    values = _fake_values(problem, spec)
    found = [values, torch.empty_like(values[0])]
    wants = Needs(*needs)
    if wants.hidden:
        found.append(torch.empty_like(problem.hidden, memory_format=torch.contiguous_format))
    if wants.weight:
        found.append(values.new_empty(problem.weight.shape))
    if wants.bias:
        found.append(values.new_empty(problem.weight.shape[0]))
    if spec.sparse is not None:
        found.append(values.new_empty(2))
    return found


def _fake_values(inputs: Inputs, spec: Spec) -> Tensor:
    hidden = inputs.hidden
    return hidden.new_empty(spec.outputs, hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _rows_of(which: Tensor | None) -> Tensor | None:
    """Indices of the rows to compute [n], or None for all of them; a synchronisation on an accelerator."""
    if which is None:
        return None
    index = which.nonzero().squeeze(1)
    return None if index.numel() == which.numel() else index


def _scatter(rows: Tensor, index: Tensor | None, n: int) -> Tensor:
    """Entries [..., n'] of the rows of `index` among [..., n]; 0 for the rows that were left out."""
    return rows if index is None else rows.new_zeros(*rows.shape[:-1], n).index_copy_(-1, index, rows)


def _unpack_inputs(tensors: list[Tensor | None]) -> Inputs:
    hidden, weight, *rest = tensors
    assert hidden is not None
    assert weight is not None
    return Inputs(hidden, weight, *rest)


def _pack_spec(spec: Spec) -> tuple[str, list[float], str, int | None, str, float, bool, list[float], int]:
    heads = [number for head in (spec.student, spec.teacher) if head is not None for number in _pack_head(head)]
    return spec.kind, heads, *spec[3:8], *_pack_sparse(spec.sparse)


def _unpack_spec(
    kind: str,
    heads: list[float],
    backend: str,
    chunk_size: int | None,
    variant: str,
    parameter: float,
    extras: bool,
    sparse: list[float],
    seed: int,
) -> Spec:
    teacher = _unpack_head(heads[3:]) if len(heads) > 3 else None
    how = cast(Backend, backend), chunk_size, variant, parameter, extras
    return Spec(cast(Kind, kind), _unpack_head(heads[:3]), teacher, *how, _unpack_sparse(sparse, seed))


def _pack_sparse(sparse: Sparse | None) -> tuple[list[float], int]:
    """An exact backward is an empty list, no threshold one of 0."""
    return ([], 0) if sparse is None else ([sparse.error, sparse.threshold or 0.0], sparse.seed)


def _unpack_sparse(numbers: list[float], seed: int) -> Sparse | None:
    return (Sparse(seed, threshold=numbers[1]) if numbers[1] else Sparse(seed, numbers[0])) if numbers else None


def _pack_head(head: HeadOptions) -> tuple[float, float, float]:
    return head.temperature, head.logit_scale, head.softcap or 0.0


def _unpack_head(numbers: list[float]) -> HeadOptions:
    temperature, logit_scale, softcap = numbers
    return HeadOptions(temperature, logit_scale, softcap or None)


def _pack_surrogate(surrogate: Surrogate | None) -> tuple[str, list[float]]:
    """No bound is a bound of infinity, no surrogate one without a name."""
    if surrogate is None:
        return "", []
    bounds = (surrogate.dual_clip, surrogate.truncate_ratio)
    return surrogate.method, [
        surrogate.clip_low,
        surrogate.clip_high,
        *(math.inf if bound is None else bound for bound in bounds),
    ]


def _unpack_surrogate(method: str, clips: list[float]) -> Surrogate | None:
    if not method:
        return None
    low, high, *bounds = clips
    return Surrogate(cast(Method, method), low, high, *(None if math.isinf(bound) else bound for bound in bounds))
