"""FLOPs of the operators, for `torch.utils.flop_counter`: those of the GEMMs that the driver makes.

All rows are counted. How many are left out is data, and a formula is given shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import fastkl.kernels.operators.library  # noqa: F401  the operators must exist
from fastkl.kernels.operators.records import unpack
from fastkl.kernels.problem import Inputs, Needs, Problem


def gemm_flops(rows: int, vocabulary: int, hidden: int, teacher_hidden: int = 0, gradients: int = 0) -> int:
    """Logits of the student and of the teacher (hidden size 0: none), and `gradients` of hidden and weight (0, 1, 2)."""
    return 2 * rows * vocabulary * (hidden * (1 + gradients) + teacher_hidden)


@register_flop_formula(torch.ops.fastkl.evaluate)
def _evaluate(*packed: Any, **_: Any) -> int:
    (problem,) = unpack((Problem,), *packed)
    return gemm_flops(*_sizes(problem.inputs))


@register_flop_formula(torch.ops.fastkl.evaluate_with_gradients)
def _evaluate_with_gradients(*packed: Any, **_: Any) -> int:
    problem, needs = unpack((Problem, Needs), *packed)
    return gemm_flops(*_sizes(problem.inputs), gradients=needs.hidden + needs.weight)


def _sizes(shapes: Inputs) -> tuple[int, int, int, int]:
    """Rows, vocabulary, and hidden sizes; the tensors of the inputs are their shapes here."""
    hidden: Any = shapes.hidden
    weight: Any = shapes.weight
    teacher_hidden: Any = shapes.teacher_hidden
    return hidden[0], weight[0], hidden[1], 0 if teacher_hidden is None else teacher_hidden[1]
