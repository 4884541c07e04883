"""What every loss does around the operators: checks and flattens its arguments, and reduces the losses of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss import hints
from fastkl._loss.heads.operands import first_rows, operands
from fastkl._loss.heads.shares import Piece, is_part
from fastkl._loss.numbers import check_logprobs
from fastkl._loss.options import record
from fastkl._loss.output import LossOutput, masked_extreme, masked_mean, sparse_metrics
from fastkl.kernels.backend import has_pieces
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.operators.autograd import Losses, row_losses, summed_loss
from fastkl.kernels.problem import HeadOptions, Inputs, Kind, Problem, RowLoss, Rows, Spec


class Call(NamedTuple):
    """What the losses have in common, of one call: N rows, one for each token."""

    shape: torch.Size  # of the tokens
    inputs: Inputs
    spec: Spec
    token_weights: Tensor  # [N] in the compute dtype; 0 leaves a row out
    active: Tensor  # bool [N]: the weight is not 0
    reduction: check.Reduction
    skip_zero_rows: bool
    weight_grad: Tensor | None
    all_ids: int  # of the head, those that vocab_size leaves out included
    piece: Piece | None  # of the head, that this process has; None: all of it

    @property
    def vocabulary(self) -> int:
        """The ids that take part, of all processes."""
        share = self.spec.share
        return self.inputs.weight.shape[0] if share is None else share.vocabulary

    def per_row(self, tensor: Tensor) -> Tensor:
        """A tensor [...] with an entry per token as [N], in the compute dtype, 0 where not active."""
        return tensor.reshape(-1).to(self.token_weights.dtype).where(self.active, 0.0)

    def rows(self, graded: Tensor | None = None) -> Rows:
        """`graded` [N]: the active rows that have a gradient, None: all of them."""
        if not self.skip_zero_rows:
            return Rows()
        return Rows(self.active, None if graded is None else self.active & graded)


def flat_call(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor | None,
    options: Mapping[str, Any],
    kind: Kind,
    who: str = "",  # prefixes the names of hidden and weight in errors
    reductions: tuple[str, ...] = ("mean", "sum", "none"),
    tokens_name: str = "tokens",
) -> Call:
    """Checks hidden [..., D], weight [V, D], tokens [...] and the options that all losses share; cuts the vocabulary."""
    piece: Piece | None = options["group"]
    bias, weight_grad, vocab_size = options["bias"], options["weight_grad"], options.get("vocab_size")
    head = record(HeadOptions, options)
    check.check_head(hidden, weight, bias, who, part=is_part(piece))
    reduction = check.check_reduction(options.get("reduction", "none"), options.get("normalizer"), hidden, reductions)
    check.check_plan(options["backend"], options["chunk_size"], weight, weight_grad)
    sparse, ignored = check.sparse(options["backward"]), options["ignore_index"]
    token_weights = check.mask_weights(options.get("mask"), hidden, compute_dtype(hidden.dtype))
    if tokens is not None:
        tokens = check.check_per_token(tokens_name, tokens, hidden)
    all_ids = weight.shape[0] if piece is None else piece.share.vocabulary
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, {f"{who}weight": all_ids})
        own = vocab_size if piece is None else piece.rows_below(vocab_size)
        weight_grad = None if weight_grad is None else first_rows(weight_grad, own)
    if tokens is not None:
        vocabulary = all_ids if vocab_size is None else vocab_size
        active = token_weights != 0
        tokens = check.check_tokens(tokens, hidden, vocabulary, ignored, tokens_name, active).reshape(-1)
        token_weights = token_weights.where(tokens != ignored, 0.0)
    active = token_weights != 0
    shape = hidden.shape[:-1]
    hidden, weight, bias = operands(hidden, weight, bias, vocab_size, piece)
    tokens = None if tokens is None else tokens.where(active, 0)
    inputs = Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias, tokens)
    spec = Spec(kind, head, backend=options["backend"], chunk_size=options["chunk_size"], sparse=sparse)
    if piece is not None:
        spec = spec._replace(share=piece.cut(vocab_size))
    if (hard_coef := options.get("hard_coef", 0.0)) != 0.0:
        check.check_hard_coef(hard_coef, tokens)
        spec = spec._replace(hard_coef=float(hard_coef))
    skip = options["skip_zero_rows"]
    return Call(shape, inputs, spec, token_weights, active, reduction, skip, weight_grad, all_ids, piece)


def token_logprobs(call: Call, name: str, logprobs: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Log-probs of the tokens under another policy, checked, [N]."""
    if logprobs is None:
        return None
    given = check.check_per_token(name, logprobs, hidden)
    check.check_floats(name, given)
    found = call.per_row(given)
    check_logprobs(name, found)
    return found


def reduced_loss(call: Call, row_loss: RowLoss, rows: Rows, count: Tensor) -> Losses:
    """The losses of the rows [...], or their sum over what the reduction divides by: by default `count`, 0-dim."""
    hints.warn_without_gradient(call.inputs)
    if call.spec.share is not None and call.spec.backend in ("triton", "epilogue") and not has_pieces(call.spec):
        raise ValueError(
            f'group is given but backend is "{call.spec.backend}", whose kernels for a divergence, label_smoothing or '
            f'per_token see all ids of a row: pass backend="auto", which is PyTorch for these'
        )
    call.reduction.check_count(count)
    problem = Problem(call.inputs, call.spec, row_loss, rows)
    if call.reduction.kind == "none":
        losses = row_losses(problem, call.weight_grad)
        return losses._replace(losses=losses.losses.reshape(call.shape))
    total = summed_loss(problem, call.weight_grad)
    return total._replace(losses=total.losses * call.reduction.factor(count))


def divergence_output(call: Call, name: str, factor: float) -> tuple[LossOutput, Tensor]:
    """factor · values[0] of the rows, reduced, with metrics under `name`; and the values [K, ...], 0 where masked.

    A hard target, `call.spec.hard_coef`, is multiplied by no factor.
    """
    hard_coef = call.spec.hard_coef / factor
    call = call._replace(spec=call.spec._replace(hard_coef=hard_coef))
    row_loss = RowLoss(call.token_weights * factor, hard_coef=hard_coef)
    loss, values, statistics = reduced_loss(call, row_loss, call.rows(), call.token_weights.sum())
    values = values.where(call.active, 0.0)
    metrics = {
        f"{name}_mean": masked_mean(values[0], call.active),
        f"{name}_max": masked_extreme(values[0], call.active, largest=True),
        **({} if hard_coef == 0.0 else {"cross_entropy": masked_mean(values[-1], call.active)}),
        **sparse_metrics(statistics),
    }
    values = values.reshape(values.shape[0], *call.shape)
    logprobs = None if call.inputs.tokens is None else -values[1]
    return LossOutput(loss, logprobs, metrics), values
