"""The chunk driver: GEMM → row function → GEMMs, for every loss.

    for a chunk of rows:   x = alpha (h Wᵀ + b)              [n, V]   vendor GEMM into a workspace
                           values, u = row function(x)       [K, n], u = d values[0] / d x, in place where dtypes allow
                           slopes = row_loss(values)        [n]      d loss / d values[0]
                           dh = slopes · (u W)               [n, D]   vendor GEMMs; alpha and the slopes are applied on
                           dW += uᵀ (slopes · h)             [V, D]   the thin side, never over the vocabulary

A row function in Triton adds b itself (`backend.adds_bias`): x is made without it.
A row whose slope is 0 has no gradient, whatever its logits are: its u becomes 0, and slopes · h is 0 there.
With the backend "epilogue" x is in no memory: its product leaves u of the rows (`epilogue/triton.py`), times a factor.
dh and dW are made from a random subset of the columns of u where `spec.sparse` says so (`sparse/estimator.py`).
Where several processes have the rows of W between them, `spec.share`, the row function exchanges what is one number for a
row (`rows/parallel/`). dh is added up over the processes when all chunks are done. dW is of each one's own rows.

Nothing of size N × V exists: a chunk's logits live in the workspace and are gone with the next chunk. A new loss is a new
row function (`rows/interface.py`). Which rows are a chunk is in `chunking.py`, the place of one in `workspace.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkl.kernels.backend import (
    clear_rows,
    column_sampler,
    entropy_gradient,
    epilogue,
    planned,
    row_function,
    scorer,
)
from fastkl.kernels.chunking import chunk_rows, products, row_chunks
from fastkl.kernels.gemm import (
    add_bias_gradient,
    add_weight_gradient,
    compute_dtype,
    hidden_gradient,
    most_rows,
)
from fastkl.kernels.problem import Gradients, Inputs, Needs, RowLoss, Spec
from fastkl.kernels.rows.parallel.share import add_up
from fastkl.kernels.sparse.estimator import ColumnSample, ColumnSampler, Estimates, blocks
from fastkl.kernels.sparse.pytorch import add_to_weight_gradient, merged
from fastkl.kernels.workspace import Chunk, Workspace


@torch.no_grad()
def evaluate(spec: Spec, inputs: Inputs) -> Tensor:
    """Values [K, N] in the compute dtype, no gradient work: one GEMM per head, where possible without any logits."""
    values = _new_values(spec, inputs)
    if (score := scorer(spec, inputs)) is not None:
        score(values)
        return values
    evaluate_rows = row_function(spec, inputs.hidden)
    workspace = Workspace(spec, inputs, chunk_rows(spec, inputs, gradient=False))
    with _full_precision(inputs):
        for chunk in map(workspace.chunk, row_chunks(spec, inputs, gradient=False)):
            evaluate_rows(chunk.logits, chunk.tokens, values[:, chunk.rows], None)
    return values


@torch.no_grad()
def evaluate_with_gradients(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    needs: Needs,
    weight_grad: Tensor | None = None,
    estimates: Estimates | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Values [K, N], losses [N], and the gradients of their sum: one GEMM per head and one per gradient wanted.

    The weight's gradient is added to `weight_grad` [V, D], in the compute dtype, where one is given. Into `estimates`
    goes what `weight_gradients` makes the gradients of weight and bias from later, without any logits.
    """
    hidden, weight = inputs.hidden, inputs.weight
    spec = planned(spec, inputs, row_loss)
    values = _new_values(spec, inputs)
    losses = values.new_zeros(values.shape[1])
    grad_hidden = _new_hidden_gradient(spec, inputs) if needs.hidden else None
    grad_weight = _new_weight_gradient(spec, inputs) if weight_grad is None and needs.weight else weight_grad
    sums = Gradients(grad_hidden, grad_weight, values.new_zeros(weight.shape[0]) if needs.bias else None)
    sampler = column_sampler(spec, inputs, row_loss)
    groups = products(spec, inputs, needs)
    most = chunk_rows(spec, inputs, gradient=True)
    workspace = Workspace(spec, inputs, most, max(most, most_rows([_span(group) for group in groups])))
    row_pass, slopes = _row_pass(spec, inputs, row_loss), torch.empty_like(losses)
    epilogue_pass = _epilogue_pass(spec, inputs, row_loss)
    with _full_precision(inputs):
        for group in groups:
            span = _span(group)
            u, slope = workspace.gradient[: span.stop - span.start], slopes[span]
            for rows in group:
                place = rows.start - span.start
                if epilogue_pass is not None:
                    own = u[place : place + rows.stop - rows.start]
                    losses[rows], slopes[rows] = epilogue_pass(rows, own, values[:, rows])
                else:
                    chunk = workspace.chunk(rows, place)
                    losses[rows], slopes[rows], factor = row_pass(chunk, values[:, rows])
            if sums.bias is not None:  # first, for a sampler may overwrite the gradient
                add_bias_gradient(sums.bias, u, slope)
            if sampler is None:
                _add_products(sums, inputs, span, u, slope, overwrite=weight_grad is None and span.start == 0)
            else:  # of the group's only chunk
                _add_sparse_products(sums, inputs, chunk, slope, factor, sampler, estimates)
    if spec.share is not None and sums.hidden is not None:
        sums = sums._replace(hidden=add_up(spec.share, sums.hidden).to(hidden.dtype))
    return values, losses, sums if sampler is None else sums._replace(statistics=sampler.statistics())


def _row_pass(
    spec: Spec, inputs: Inputs, row_loss: RowLoss
) -> Callable[[Chunk, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """What makes values [K, n] and the gradient of a chunk from its logits.

    It gives losses, slopes by the scores, and what of a slope the row function has left to do (`interface.py`), [n] each.
    """
    evaluate_rows, clear = row_function(spec, inputs.hidden), clear_rows(spec, inputs.hidden)
    mixed = entropy_gradient(spec, inputs.hidden) if spec.kind == "token_nll_entropy" else None

    def row_pass(chunk: Chunk, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, logits, tokens, gradient = chunk
        factor = evaluate_rows(logits, tokens, values, None if mixed else gradient)
        losses, slope, others = row_loss.take(rows).losses_and_slopes(values)
        if mixed is not None and tokens is not None:
            weights = torch.cat([slope[None], slope.new_zeros(2, len(slope)) if others is None else others])
            mixed(logits, tokens, values, weights, gradient)
            slope = (weights != 0).any(0).to(slope.dtype)  # the weights are in the gradient
        clear(gradient, slope)
        if factor is not None:
            factor = factor.where(slope != 0, 1.0)  # 0 · NaN = 0, as in the gradient
            slope = slope * factor
        return losses, slope * spec.student.alpha, factor

    return row_pass


def _epilogue_pass(
    spec: Spec, inputs: Inputs, row_loss: RowLoss
) -> Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What makes values and gradient of rows without logits, as `_row_pass` does from them; None: there are logits."""
    token_nll, clear = epilogue(spec, inputs), clear_rows(spec, inputs.hidden)
    if token_nll is None:
        return None

    def row_pass(rows: slice, gradient: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        own = row_loss.take(rows)
        assert own.old_logprobs is not None
        factor = token_nll(rows, own.old_logprobs, values, gradient)
        losses, slope, _ = own.losses_and_slopes(values)
        clear(gradient, slope)
        return losses, (slope * spec.student.alpha * factor).where(slope != 0, 0.0)

    return row_pass


def _add_products(
    sums: Gradients, inputs: Inputs, rows: slice, gradient: Tensor, slope: Tensor, overwrite: bool = False
) -> None:
    """The two products of `rows`, into the sums; `overwrite`: whatever the weight's held."""
    if sums.hidden is not None:
        torch.mul(hidden_gradient(gradient, inputs.weight), slope[:, None], out=sums.hidden[rows])
    if sums.weight is not None:
        add_weight_gradient(sums.weight, gradient, inputs.hidden[rows], slope, overwrite=overwrite)


def _add_sparse_products(
    sums: Gradients,
    inputs: Inputs,
    chunk: Chunk,
    slope: Tensor,
    factor: Tensor | None,
    sampler: ColumnSampler,
    estimates: Estimates | None,
) -> None:
    """`_add_products` of a chunk from a sample of columns for each block of its rows."""

    def draw(block: slice) -> ColumnSample:
        left = None if factor is None else factor[block]
        return sampler.sample(chunk.gradient[block], slope[block], _named_tokens(chunk, block), left)

    drawn = ((block, draw(block)) for block in blocks(slope.shape[0], slope.device))
    for block, sample in merged(drawn, chunk.gradient, slope):
        rows = slice(chunk.rows.start + block.start, chunk.rows.start + block.stop)
        if sums.hidden is not None:
            sums.hidden[rows] = sample.hidden_gradient()
        if estimates is not None:
            estimates.take(rows, sample.estimate(rows))
        elif sums.weight is not None:
            sample.add_to_weight_gradient(sums.weight, inputs.hidden[rows])


def _named_tokens(chunk: Chunk, block: slice) -> list[Tensor]:
    """The ids that the loss names in a block of a chunk: its tokens, and the teacher's likeliest."""
    ids_of_block = [] if chunk.tokens is None else [chunk.tokens[block]]
    if (ids := chunk.logits.top_ids) is not None:
        ids_of_block.append(torch.where(ids[block] < 0, ids[block, :1], ids[block]).reshape(-1))
    return ids_of_block


@torch.no_grad()
def weight_gradients(
    spec: Spec,
    inputs: Inputs,
    row_loss: RowLoss,
    upstream: Tensor,
    needs: Needs,
    estimates: Estimates,
    weight_grad: Tensor | None = None,
) -> Gradients:
    """Gradients of weight and bias by the losses of `estimates`, times `upstream` [N]; logits again for the rest."""
    grad_weight = _new_weight_gradient(spec, inputs) if weight_grad is None and needs.weight else weight_grad
    grad_bias = upstream.new_zeros(inputs.weight.shape[0]) if needs.bias else None
    with _full_precision(inputs):
        for rows, ids, gradient, slope, _ in estimates.kept:
            scale = slope * upstream[rows]
            if grad_weight is not None:
                add_to_weight_gradient(grad_weight, ids, gradient, inputs.hidden[rows], scale)
            if grad_bias is not None:
                part = grad_bias.new_zeros(ids.shape[0])
                add_bias_gradient(part, gradient, scale)
                grad_bias.index_add_(0, ids, part)
    if estimates.others:
        again = torch.cat([torch.arange(rows.start, rows.stop, device=upstream.device) for rows in estimates.others])
        rest = row_loss.times(upstream).take(again)
        exact = evaluate_with_gradients(spec, inputs.take(again), rest, needs._replace(hidden=False), grad_weight)[2]
        grad_bias = None if grad_bias is None or exact.bias is None else grad_bias.add_(exact.bias)
    return Gradients(None, grad_weight, grad_bias)


def _full_precision(inputs: Inputs) -> torch.autocast:
    """The operands already have the dtype they are to be multiplied in; autocast would round the accumulators."""
    return torch.autocast(inputs.hidden.device.type, enabled=False)


def _new_values(spec: Spec, inputs: Inputs) -> Tensor:
    hidden = inputs.hidden
    return hidden.new_zeros(spec.outputs, hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _new_hidden_gradient(spec: Spec, inputs: Inputs) -> Tensor:
    """In the compute dtype where other processes add to it: the parts may be far larger than their sum."""
    dtype = inputs.hidden.dtype if spec.share is None else compute_dtype(inputs.hidden.dtype)
    return torch.empty_like(inputs.hidden, dtype=dtype)


def _new_weight_gradient(spec: Spec, inputs: Inputs) -> Tensor:
    """Room for the weight's gradient, which the first chunk overwrites; zeros if not all of it is written."""
    new = torch.empty_like if inputs.hidden.shape[0] > 0 and spec.sparse is None else torch.zeros_like
    return new(inputs.weight, dtype=compute_dtype(inputs.weight.dtype), memory_format=torch.contiguous_format)


def _span(chunks: list[slice]) -> slice:
    """The rows of neighbouring chunks."""
    return slice(chunks[0].start, chunks[-1].stop)
