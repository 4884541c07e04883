"""The chunk driver: GEMM → row function → GEMMs, for every loss.

    for a chunk of rows:   x = alpha (h Wᵀ + b)              [n, V]   vendor GEMM into a workspace
                           values, u = row function(x)       [K, n], u = d values[0] / d x, in place where dtypes allow
                           slopes = objective(values)        [n]      d loss / d values[0]
                           dh = slopes · (u W)               [n, D]   vendor GEMMs; alpha and the slopes are applied on
                           dW += uᵀ (slopes · h)             [V, D]   the thin side, never over the vocabulary

Nothing of size N × V exists: a chunk's logits live in the workspace and are gone with the next chunk. A new loss is a new
row function (`rows_torch.py`); plans, chunking and gradients are here and only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.backend import entropy_gradient, row_function, scorer
from fastkl.kernels.gemm import add_weight_gradient, compute_dtype, gradient_dtype, hidden_gradient, project
from fastkl.kernels.problem import Gradients, HeadOptions, Inputs, Needs, Objective, Spec
from fastkl.kernels.rows import Logits

# What the logits of a chunk may take. On a GPU large chunks keep the GEMMs at full speed (1024-4096 rows at V = 150k).
WORKSPACE_BYTES = {"cpu": 128 * 2**20, "accelerator": 2**30}


def chunk_rows(spec: Spec, inputs: Inputs, gradient: bool) -> int:
    """Rows per chunk: `spec.chunk_size`, or what the workspace budget holds, spread evenly over the chunks."""
    n = inputs.hidden.shape[0]
    limit = spec.chunk_size
    if limit is None:
        budget = WORKSPACE_BYTES["cpu" if inputs.hidden.is_cpu else "accelerator"]
        limit = max(1, budget // workspace_bytes_per_row(spec, inputs, gradient))
    chunks = max(1, -(-n // limit))
    return max(1, -(-n // chunks))


def workspace_bytes_per_row(spec: Spec, inputs: Inputs, gradient: bool) -> int:
    """Logits of the student, of the teacher if there is one, and the gradient where it needs a place of its own."""
    logits, low = compute_dtype(inputs.hidden.dtype), gradient_dtype(inputs.hidden)
    apart = low.itemsize if gradient and low != logits else 0
    return inputs.weight.shape[0] * (logits.itemsize * (1 if spec.teacher is None else 2) + apart)


@torch.no_grad()
def evaluate(spec: Spec, inputs: Inputs) -> Tensor:
    """Values [K, N] in the compute dtype, no gradient work: one GEMM per head, where possible without any logits."""
    values = _new_values(spec, inputs)
    if (score := scorer(spec, inputs)) is not None:
        score(values)
        return values
    rows_of = row_function(spec, inputs.hidden)
    with _full_precision(inputs):
        for chunk in _chunks(spec, inputs, gradient=False):
            rows_of(chunk.logits, chunk.tokens, values[:, chunk.rows], None)
    return values


@torch.no_grad()
def evaluate_with_gradients(
    spec: Spec, inputs: Inputs, objective: Objective, needs: Needs, weight_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Gradients]:
    """Values [K, N], losses [N], and the gradients of their sum: one GEMM per head and one per gradient wanted.

    The weight's gradient is added to `weight_grad` [V, D], in the compute dtype, where one is given.
    """
    hidden, weight = inputs.hidden, inputs.weight
    values = _new_values(spec, inputs)
    losses = values.new_zeros(values.shape[1])
    grad_hidden = torch.empty_like(hidden) if needs.hidden else None
    grad_weight = weight_grad if weight_grad is not None else _new_weight_gradient(inputs) if needs.weight else None
    grad_bias = values.new_zeros(weight.shape[0]) if needs.bias else None
    rows_of = row_function(spec, hidden)
    mixed = entropy_gradient(spec, hidden) if spec.kind == "token_nll_entropy" else None
    with _full_precision(inputs):
        for rows, logits, tokens, gradient in _chunks(spec, inputs, gradient=True):
            own = values[:, rows]
            rows_of(logits, tokens, own, None if mixed else gradient)
            losses[rows], slope, entropy_slope = objective.take(rows).losses_and_slopes(own)
            if mixed is not None and tokens is not None:
                weights = slope, torch.zeros_like(slope) if entropy_slope is None else entropy_slope
                mixed(logits, tokens, own, torch.stack(weights), gradient)
                slope = torch.ones_like(slope)
            slope = slope * spec.student.alpha
            if grad_hidden is not None:
                grad_hidden[rows] = hidden_gradient(gradient, weight).mul_(slope[:, None])
            if grad_weight is not None:
                fresh = weight_grad is None and rows.start == 0
                add_weight_gradient(grad_weight, gradient, hidden[rows], slope, overwrite=fresh)
            if grad_bias is not None:
                grad_bias.addmv_(gradient.t().to(grad_bias.dtype), slope)
    return values, losses, Gradients(grad_hidden, grad_weight, grad_bias)


def _full_precision(inputs: Inputs) -> torch.autocast:
    """The operands already have the dtype they are to be multiplied in; autocast would round the accumulators."""
    return torch.autocast(inputs.hidden.device.type, enabled=False)


def _new_values(spec: Spec, inputs: Inputs) -> Tensor:
    hidden = inputs.hidden
    return hidden.new_zeros(spec.outputs, hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _new_weight_gradient(inputs: Inputs) -> Tensor:
    """Room for the weight's gradient, which the first chunk overwrites; zeros if there is none."""
    new = torch.empty_like if inputs.hidden.shape[0] > 0 else torch.zeros_like
    return new(inputs.weight, dtype=compute_dtype(inputs.weight.dtype), memory_format=torch.contiguous_format)


class _Chunk(NamedTuple):
    rows: slice
    logits: Logits
    tokens: Tensor | None
    gradient: Tensor  # where the row function leaves it; of no use without one


def _chunks(spec: Spec, inputs: Inputs, gradient: bool) -> Iterator[_Chunk]:
    """The chunks of a problem; their logits share one workspace per head."""
    hidden, step = inputs.hidden, chunk_rows(spec, inputs, gradient)
    student = _workspace(inputs, step, compute_dtype(hidden.dtype))
    teacher = None if spec.teacher is None else torch.empty_like(student)
    low = gradient_dtype(hidden)
    into = student if not gradient or low == student.dtype else _workspace(inputs, step, low)
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, min(start + step, hidden.shape[0]))
        n = rows.stop - start
        project(hidden[rows], inputs.weight, inputs.bias, spec.student.alpha, student[:n])
        logits = Logits(student[:n], spec.student.cap)
        if teacher is not None and spec.teacher is not None:
            _teacher_scores(inputs, rows, spec.teacher, teacher[:n])
            logits = logits._replace(teacher=teacher[:n], teacher_cap=spec.teacher.cap)
        if inputs.top_ids is not None and inputs.top_logprobs is not None:
            logits = logits._replace(top_ids=inputs.top_ids[rows], top_logprobs=inputs.top_logprobs[rows])
        yield _Chunk(rows, logits, None if inputs.tokens is None else inputs.tokens[rows], into[:n])


def _teacher_scores(inputs: Inputs, rows: slice, options: HeadOptions, out: Tensor) -> None:
    """The teacher's scaled scores, from its head or from its logits."""
    if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
        project(inputs.teacher_hidden[rows], inputs.teacher_weight, inputs.teacher_bias, options.alpha, out)
        return
    logits = inputs.teacher_logits
    assert logits is not None
    given = logits(torch.arange(rows.start, rows.stop, device=out.device)) if callable(logits) else logits[rows]
    out.copy_(given[:, : out.shape[1]])
    if options.alpha != 1.0:
        out.mul_(options.alpha)


def _workspace(inputs: Inputs, step: int, dtype: torch.dtype) -> Tensor:
    return inputs.hidden.new_empty(min(step, inputs.hidden.shape[0]), inputs.weight.shape[0], dtype=dtype)
