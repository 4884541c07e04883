"""What every loss does around the operators: which rows take part, and the reduction of theirs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.output import LossOutput, masked_extreme, masked_mean, sparse_metrics
from fastkl.kernels.autograd import row_losses, summed_loss
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.problem import Inputs, RowLoss, Spec


class Rows(NamedTuple):
    """The tokens of a call, flat [N]."""

    weights: Tensor  # in the compute dtype; 0 leaves a row out
    active: Tensor  # bool: the weight is not 0
    tokens: Tensor | None  # int64, 0 where not active


def rows_of(mask: Tensor | None, tokens: Tensor | None, hidden: Tensor, vocabulary: int, ignore_index: int) -> Rows:
    """Checks mask [...] and tokens [...]; an ignored token has the weight 0."""
    weights = check.mask_weights(mask, hidden, compute_dtype(hidden.dtype))
    if tokens is None:
        return Rows(weights, weights != 0, None)
    y = check.check_tokens(tokens, hidden, vocabulary, ignore_index).reshape(-1)
    weights = weights.where(y != ignore_index, 0.0)
    active = weights != 0
    return Rows(weights, active, y.where(active, 0))


class Reduced(NamedTuple):
    loss: Tensor  # 0-dim, or one entry per token
    values: Tensor  # [K, N], detached
    statistics: Tensor | None  # of a sparse backward


def reduced_loss(
    reduce: check.Reduction,
    count: Tensor,  # 0-dim, the divisor of a mean that has no normalizer
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    active: Tensor | None,
    graded: Tensor | None,
    weight_grad: Tensor | None,
) -> Reduced:
    """The losses of the rows, flat, or their sum over what the reduction divides by."""
    if reduce.kind == "none":
        return Reduced(*row_losses(spec, inputs, row_loss, active, graded, weight_grad))
    total, values, statistics = summed_loss(spec, inputs, row_loss, active, graded, weight_grad)
    return Reduced(total * reduce.factor(count), values, statistics)


def divergence_output(
    name: str,
    factor: float,
    reduce: check.Reduction,
    spec: Spec,
    inputs: Inputs,
    rows: Rows,
    skip_zero_rows: bool,
    shape: tuple[int, ...],
    weight_grad: Tensor | None,
) -> tuple[LossOutput, Tensor]:
    """factor · values[0] of the rows, reduced, with metrics under `name`; and the values [K, *shape], 0 where masked."""
    active = rows.active if skip_zero_rows else None
    row_loss = RowLoss(rows.weights * factor)
    loss, values, statistics = reduced_loss(
        reduce, rows.weights.sum(), spec, inputs, row_loss, active, None, weight_grad
    )
    values = values.where(rows.active, 0.0)
    metrics = {
        f"{name}_mean": masked_mean(values[0], rows.active),
        f"{name}_max": masked_extreme(values[0], rows.active, largest=True),
        **sparse_metrics(statistics),
    }
    values = values.reshape(values.shape[0], *shape)
    logprobs = None if rows.tokens is None else -values[1]
    return LossOutput(loss.reshape(shape) if reduce.kind == "none" else loss, logprobs, metrics), values
