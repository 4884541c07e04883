"""The place of a chunk: its logits, those of the teacher, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkl.kernels.backend import adds_bias
from fastkl.kernels.chunking import gradient_lies_apart
from fastkl.kernels.gemm import compute_dtype, gradient_dtype, new_scores, project, scaled_into
from fastkl.kernels.problem import HeadOptions, Inputs, Spec
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.parallel.vocabulary import WHOLE, Pieces, Vocabulary


class Chunk(NamedTuple):
    rows: slice
    logits: Logits
    tokens: Tensor | None
    gradient: Tensor  # where the row function leaves it; of no use without one


class Workspace:
    """Logits of the chunks, one after the other, and gradients of those that are multiplied together."""

    def __init__(self, spec: Spec, inputs: Inputs, rows: int, product_rows: int = 0) -> None:
        self.spec, self.inputs = spec, inputs
        dtype = compute_dtype(inputs.hidden.dtype)
        if product_rows > 0 and spec.backend == "epilogue":
            self.gradient = _workspace(inputs, product_rows, gradient_dtype(inputs.hidden))
            return
        self.student = _workspace(inputs, rows, dtype)
        self.teacher = None if spec.teacher is None else _workspace(inputs, rows, dtype)
        self.student_bias = self.teacher_bias = None
        self.vocabulary: Vocabulary = WHOLE if spec.share is None else Pieces(spec.share)
        if adds_bias(spec, inputs.hidden):
            self.inputs = inputs._replace(bias=None, teacher_bias=None)
            self.student_bias = _scaled_bias(inputs.bias, spec.student, dtype)
            self.teacher_bias = _scaled_bias(inputs.teacher_bias, spec.teacher, dtype)
        apart = product_rows > 0 and gradient_lies_apart(inputs)
        self.gradient = _workspace(inputs, product_rows, gradient_dtype(inputs.hidden)) if apart else self.student

    def chunk(self, rows: slice, place: int = 0) -> Chunk:
        """The logits of `rows`, with `place` as the first row of their gradient."""
        inputs, n = self.inputs, rows.stop - rows.start
        project(inputs.hidden[rows], inputs.weight, inputs.bias, self.spec.student.alpha, self.student[:n])
        logits = Logits(
            self.student[:n],
            self.spec.student.cap,
            student_bias=self.student_bias,
            teacher_bias=self.teacher_bias,
            class_weight=inputs.class_weight,
            vocabulary=self.vocabulary,
        )
        if self.teacher is not None and self.spec.teacher is not None:
            _teacher_scores(inputs, rows, self.spec.teacher, self.teacher[:n])
            logits = logits._replace(teacher=self.teacher[:n], teacher_cap=self.spec.teacher.cap)
        if inputs.top_ids is not None and inputs.top_logprobs is not None:
            tail = None if inputs.tail is None else inputs.tail.take(rows)
            logits = logits._replace(top_ids=inputs.top_ids[rows], top_logprobs=inputs.top_logprobs[rows], tail=tail)
        tokens = None if inputs.tokens is None else inputs.tokens[rows]
        return Chunk(rows, logits, tokens, self.gradient[place : place + n])


def _teacher_scores(inputs: Inputs, rows: slice, options: HeadOptions, out: Tensor) -> None:
    """The teacher's scaled scores, from its head or from its logits."""
    if inputs.teacher_hidden is not None and inputs.teacher_weight is not None:
        project(inputs.teacher_hidden[rows], inputs.teacher_weight, inputs.teacher_bias, options.alpha, out)
        return
    logits = inputs.teacher_logits
    assert logits is not None
    scores = logits(torch.arange(rows.start, rows.stop, device=out.device)) if callable(logits) else logits[rows]
    scores = scores[:, : out.shape[1]]
    if options.alpha == 1.0:
        out.copy_(scores)
    else:
        scaled_into(out, scores, out.new_full((1,), options.alpha))


def _scaled_bias(bias: Tensor | None, options: HeadOptions | None, dtype: torch.dtype) -> Tensor | None:
    """What the bias of a head adds to its scaled scores."""
    return None if bias is None or options is None else bias.to(dtype) * options.alpha


def _workspace(inputs: Inputs, rows: int, dtype: torch.dtype) -> Tensor:
    return new_scores(inputs.hidden, rows, inputs.weight.shape[0], dtype)
