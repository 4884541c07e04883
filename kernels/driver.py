"""The chunk driver: GEMM → row function → GEMMs, for every loss.

    for a chunk of rows:   x = alpha (h Wᵀ + b)              [n, V]   vendor GEMM into a workspace
                           values, u = row function(x)       [K, n], in place: u = d values[0] / d x
                           slopes = objective(values)        [n]      d loss / d values[0]
                           dh = slopes · (u W)               [n, D]   vendor GEMMs; alpha and the slopes are applied on
                           dW += uᵀ (slopes · h)             [V, D]   the thin side, never over the vocabulary

Nothing of size N × V exists: a chunk's logits live in the workspace and are gone with the next chunk. A new loss is a new
row function (`rows_torch.py`); plans, chunking and gradients are here and only here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.gemm import add_weight_gradient, compute_dtype, hidden_gradient, project
from fastkl.kernels.rows import Logits, RowFunction

# What the logits of a chunk may take. On a GPU large chunks keep the GEMMs at full speed (1024-4096 rows at V = 150k).
WORKSPACE_BYTES = {"cpu": 128 * 2**20, "accelerator": 2**30}


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """z = softcap((h Wᵀ + b) · logit_scale) / temperature, softcap(x) = softcap · tanh(x / softcap)."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def alpha(self) -> float:
        """The factor of the GEMM: scaled scores x = alpha (h Wᵀ + b)."""
        return self.logit_scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def cap(self) -> float | None:
        """z = cap · tanh(x), or z = x where it is None."""
        return None if self.softcap is None else self.softcap / self.temperature


class Spec(NamedTuple):
    """What a loss computes, apart from its tensors."""

    row_function: RowFunction
    outputs: int  # K, the values the row function gives per row; the first one carries the gradient
    student: HeadOptions
    teacher: HeadOptions | None = None


class Inputs(NamedTuple):
    """The tensors of a loss on N rows. Hidden sizes of student and teacher may differ, vocabularies may not."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    tokens: Tensor | None = None  # [N] int64
    teacher_hidden: Tensor | None = None  # [N, D_t]
    teacher_weight: Tensor | None = None  # [V, D_t]
    teacher_bias: Tensor | None = None  # [V]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """d loss / d input: hidden in the dtype of the input, weight and bias in the compute dtype."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


# (values of a chunk [K, n], its rows) -> d loss / d values[0] [n]; None stands for 1.
Slopes = Callable[[Tensor, slice], Tensor]


def chunk_rows(spec: Spec, inputs: Inputs, limit: int | None) -> int:
    """Rows per chunk: `limit`, or what the workspace budget holds, spread evenly over the chunks."""
    n, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
    if limit is None:
        budget = WORKSPACE_BYTES["cpu" if inputs.hidden.is_cpu else "accelerator"]
        heads = 1 if spec.teacher is None else 2
        limit = max(1, budget // (vocabulary * compute_dtype(inputs.hidden.dtype).itemsize * heads))
    chunks = max(1, -(-n // limit))
    return max(1, -(-n // chunks))


@torch.no_grad()
def evaluate(spec: Spec, inputs: Inputs, limit: int | None) -> Tensor:
    """Values [K, N] in the compute dtype, no gradient work: one GEMM per head."""
    values = _new_values(spec, inputs)
    with _full_precision(inputs):
        for rows, logits, tokens in _chunks(spec, inputs, limit):
            spec.row_function(logits, tokens, values[:, rows], False)
    return values


@torch.no_grad()
def evaluate_with_gradients(
    spec: Spec, inputs: Inputs, slopes: Slopes | None, needs: Needs, limit: int | None
) -> tuple[Tensor, Gradients]:
    """Values [K, N] and the gradients of Σ slopes · values[0]: one GEMM per head and one per gradient wanted."""
    hidden, weight = inputs.hidden, inputs.weight
    values = _new_values(spec, inputs)
    grad_hidden = torch.empty_like(hidden) if needs.hidden else None
    grad_weight = values.new_zeros(weight.shape) if needs.weight else None
    grad_bias = values.new_zeros(weight.shape[0]) if needs.bias else None
    with _full_precision(inputs):
        for rows, logits, tokens in _chunks(spec, inputs, limit):
            spec.row_function(logits, tokens, values[:, rows], True)
            slope = values.new_ones(rows.stop - rows.start) if slopes is None else slopes(values[:, rows], rows)
            slope = slope * spec.student.alpha
            if grad_hidden is not None:
                grad_hidden[rows] = hidden_gradient(logits.student, weight).mul_(slope[:, None])
            if grad_weight is not None:
                add_weight_gradient(grad_weight, logits.student, hidden[rows], slope)
            if grad_bias is not None:
                grad_bias.addmv_(logits.student.t(), slope)
    return values, Gradients(grad_hidden, grad_weight, grad_bias)


def _full_precision(inputs: Inputs) -> torch.autocast:
    """The operands already have the dtype they are to be multiplied in; autocast would round the accumulators."""
    return torch.autocast(inputs.hidden.device.type, enabled=False)


def _new_values(spec: Spec, inputs: Inputs) -> Tensor:
    hidden = inputs.hidden
    return hidden.new_zeros(spec.outputs, hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _chunks(spec: Spec, inputs: Inputs, limit: int | None) -> Iterator[tuple[slice, Logits, Tensor | None]]:
    """The chunks of a problem; their logits share one workspace per head."""
    n, step = inputs.hidden.shape[0], chunk_rows(spec, inputs, limit)
    student_scores = _scores(inputs.hidden, inputs.weight, inputs.bias, spec.student, step)
    teacher_scores = None
    if spec.teacher is not None and inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
        teacher_scores = _scores(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, spec.teacher, step)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        logits = Logits(
            student_scores(rows),
            spec.student.cap,
            None if teacher_scores is None else teacher_scores(rows),
            None if spec.teacher is None else spec.teacher.cap,
        )
        yield rows, logits, None if inputs.tokens is None else inputs.tokens[rows]


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, step: int
) -> Callable[[slice], Tensor]:
    """A function from rows to their scaled scores x, all in one workspace of `step` rows."""
    workspace = hidden.new_empty(min(step, hidden.shape[0]), weight.shape[0], dtype=compute_dtype(hidden.dtype))

    def scores(rows: slice) -> Tensor:
        out = workspace[: rows.stop - rows.start]
        project(hidden[rows], weight, bias, options.alpha, out)
        return out

    return scores
