"""FLOPs of the operators, for `torch.utils.flop_counter`: those of the GEMMs that the driver makes.

All rows are counted. How many are left out is data, and a formula is given shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastkl.kernels.operators  # noqa: F401  the operators must exist

Shapes = list[torch.Size | None]


def gemm_flops(rows: int, vocabulary: int, hidden: int, teacher_hidden: int = 0, gradients: int = 0) -> int:
    """Logits of the student and of the teacher (hidden size 0: none), and `gradients` of hidden and weight (0, 1, 2)."""
    return 2 * rows * vocabulary * (hidden * (1 + gradients) + teacher_hidden)


@register_flop_formula(torch.ops.fastkl.evaluate)
def _evaluate(inputs: Shapes, *_: Any, **__: Any) -> int:
    return gemm_flops(*_sizes(inputs))


@register_flop_formula(torch.ops.fastkl.evaluate_with_gradients)
def _evaluate_with_gradients(
    inputs: Shapes,
    active: torch.Size | None,
    graded: torch.Size | None,
    row_loss: Shapes,
    method: str,
    clips: list[float],
    entropy_coef: float,
    needs: list[bool],
    *_: Any,
    **__: Any,
) -> int:
    return gemm_flops(*_sizes(inputs), gradients=sum(needs[:2]))


def _sizes(inputs: Shapes) -> tuple[int, int, int, int]:
    """Rows, vocabulary, and hidden sizes, of shapes in the order of `problem.Inputs`."""
    hidden, weight, _, _, teacher_hidden, *_ = inputs
    assert hidden is not None
    assert weight is not None
    return hidden[0], weight[0], hidden[1], 0 if teacher_hidden is None else teacher_hidden[1]
