"""Which row functions run: the rule, in one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import cast

from torch import Tensor

from fastkl.kernels.divergence import pytorch as pytorch_divergence
from fastkl.kernels.divergence.formula import HardTarget
from fastkl.kernels.epilogue.rule import is_faster
from fastkl.kernels.problem import Backend, Inputs, Kind, RowLoss, Spec
from fastkl.kernels.rows import pytorch as pytorch_rows
from fastkl.kernels.rows.cross_entropy import pytorch as pytorch_cross_entropy
from fastkl.kernels.rows.interface import ClearRows, EntropyGradient, RowFunction
from fastkl.kernels.score import cpu as cpu_score
from fastkl.kernels.sparse.estimator import ColumnSampler
from fastkl.kernels.sparse.pytorch import PyTorchColumnSampler
from fastkl.kernels.top_k.formula import top_k

LOGPROBS: tuple[Kind, ...] = ("token_nll", "token_nll_entropy")
BACKENDS: tuple[Backend, ...] = ("auto", "triton", "torch", "epilogue")
_PYTORCH = {
    "rows": pytorch_rows,
    "rows.cross_entropy": pytorch_cross_entropy,
    "top_k": pytorch_rows,
    "divergence": pytorch_divergence,
}  # in Triton each has a module


def row_function(spec: Spec, hidden: Tensor) -> RowFunction:
    """ "auto" is Triton on CUDA and HIP devices, PyTorch elsewhere and for float64. Nothing falls back in silence.

    Of a vocabulary in pieces Triton has those whose kernels make either the values of a row or its gradient, with an
    exchange between them; "auto" is PyTorch for the others.
    """
    hard = None if spec.hard_coef == 0.0 else HardTarget(spec.hard_coef, spec.student.temperature)
    if spec.kind == "divergence":
        return partial(_module("divergence", spec, hidden).divergence, spec.variant, spec.parameter, hard=hard)
    if spec.kind == "cross_entropy":
        return partial(_module("rows.cross_entropy", spec, hidden).cross_entropy, spec.cross_entropy)
    if spec.kind == "top_k":
        return partial(top_k, spec.variant, _module("top_k", spec, hidden), hard=hard, tail=spec.tail)
    return cast(RowFunction, getattr(_module("rows", spec, hidden), spec.kind))


def adds_bias(spec: Spec, hidden: Tensor) -> bool:
    """Whether the row function adds the heads' biases, and not the products that make its logits."""
    return _is_triton(spec, hidden)


def entropy_gradient(spec: Spec, hidden: Tensor) -> EntropyGradient:
    """What goes with the row function of kind "token_nll_entropy"."""
    return cast(EntropyGradient, _module("rows", spec, hidden).entropy_gradient)


def clear_rows(spec: Spec, hidden: Tensor) -> ClearRows:
    """What takes rows without a slope out of a chunk's gradient."""
    return cast(ClearRows, _module("rows", spec, hidden).clear_rows)


def column_sampler(spec: Spec, inputs: Inputs, row_loss: RowLoss) -> ColumnSampler | None:
    """What makes the gradients from a sample of columns, with no synchronisation in Triton; None: all columns are used."""
    if spec.sparse is None:
        return None
    arguments = spec.sparse, inputs.weight, not _sums_to_zero(spec, row_loss)
    if _is_triton(spec, inputs.hidden):
        return cast(ColumnSampler, _imported("sparse", spec.backend).TritonColumnSampler(*arguments))
    return PyTorchColumnSampler(*arguments)


def _sums_to_zero(spec: Spec, row_loss: RowLoss) -> bool:
    """Does the gradient by a row's scores sum to 0? That of a function of softmax(x) does, and an lse is none."""
    has_lse = row_loss.slopes is not None or (spec.cross_entropy is not None and spec.cross_entropy.z_loss != 0.0)
    return spec.student.cap is None and not has_lse


def scorer(spec: Spec, inputs: Inputs) -> Callable[[Tensor], None] | None:
    """What writes the values [K, N] without any logits, or None where that is the business of chunks.

    It has no part of a vocabulary that several processes share.

    Log-probs have one on a CPU, with the entropy or without, and so has a cross-entropy without smoothing. Triton has it
    for 16-bit heads, where the GEMMs of a vendor are not far faster, and for the reverse KL of two heads alone too.
    """
    if spec.share is not None:
        return None
    if spec.kind == "cross_entropy":
        return _cross_entropy_scorer(spec, inputs)
    if not _is_triton(spec, inputs.hidden) and inputs.hidden.is_cpu:
        return partial(cpu_score.token_nll, spec, inputs) if spec.kind in LOGPROBS else None
    if not _is_triton(spec, inputs.hidden) or inputs.hidden.element_size() != 2 or inputs.hidden.shape[1] == 0:
        return None
    score = _imported("score", spec.backend)
    student = score.Head(inputs.hidden, inputs.weight, inputs.bias, spec.student)
    if spec.kind in LOGPROBS:
        return lambda out: score.token_nll(student, inputs.tokens, out, entropy=spec.kind == "token_nll_entropy")
    plain = spec.kind == "divergence" and spec.variant == "reverse_kl" and not spec.extras and spec.hard_coef == 0.0
    if not plain or inputs.teacher_hidden is None or inputs.teacher_hidden.dtype != inputs.hidden.dtype:
        return None
    teacher = score.Head(inputs.teacher_hidden, inputs.teacher_weight, inputs.teacher_bias, spec.teacher)
    return lambda out: score.reverse_kl(student, teacher, inputs.tokens, out)


def _cross_entropy_scorer(spec: Spec, inputs: Inputs) -> Callable[[Tensor], None] | None:
    """From the scores of the tokens, which say nothing of the other ids' mean nor which one is the likeliest."""
    options, tokens = spec.cross_entropy, inputs.tokens
    assert options is not None
    assert tokens is not None
    score = scorer(spec._replace(kind="token_nll_entropy"), inputs)
    if score is None or spec.extras or options.label_smoothing != 0.0:
        return None

    def write(out: Tensor) -> None:
        scores = out.new_empty(5, out.shape[1])
        score(scores)
        pytorch_cross_entropy.from_scores(options, scores, tokens, inputs.class_weight, out)

    return write


def planned(spec: Spec, inputs: Inputs, row_loss: RowLoss) -> Spec:
    """The same, with a backend that says how the gradients are made: "epilogue" for what has no logits in memory.

    It needs log-probs to start from, so that it is for a policy gradient without an entropy, on 16-bit heads. "auto"
    chooses it where it was measured to be faster. Asked for where it cannot be, it is "triton".
    """
    possible = (
        spec.kind == "token_nll" and spec.sparse is None and row_loss.old_logprobs is not None
        and inputs.hidden.element_size() == 2 and inputs.hidden.shape[1] > 0 and spec.share is None
    )  # fmt: skip
    if spec.backend == "epilogue":
        return spec if possible else spec._replace(backend="triton")
    faster = possible and _is_triton(spec, inputs.hidden) and is_faster(inputs.hidden, inputs.weight)
    return spec._replace(backend="epilogue") if faster and spec.backend == "auto" else spec


def epilogue(spec: Spec, inputs: Inputs) -> Callable[[slice, Tensor, Tensor, Tensor], Tensor] | None:
    """(rows, about their log-probs, out, u) -> a factor, as `epilogue/triton.py` has it; None: there are logits."""
    if spec.backend != "epilogue":
        return None
    module = _imported("epilogue", spec.backend)

    def token_nll(rows: slice, logprobs: Tensor, out: Tensor, u: Tensor) -> Tensor:
        head = module.Head(inputs.hidden[rows], inputs.weight, inputs.bias, spec.student)
        assert inputs.tokens is not None
        return cast(Tensor, module.token_nll(head, inputs.tokens[rows], logprobs, out, u))

    return token_nll


def _module(family: str, spec: Spec, hidden: Tensor) -> ModuleType:
    if _is_triton(spec, hidden):
        return _imported(family, spec.backend)
    return _PYTORCH[family]


def _is_triton(spec: Spec, hidden: Tensor) -> bool:
    if spec.backend == "auto":
        return hidden.is_cuda and hidden.element_size() < 8 and (spec.share is None or has_pieces(spec))
    return spec.backend in ("triton", "epilogue")


def has_pieces(spec: Spec) -> bool:
    """Whether the row functions in Triton take a vocabulary in pieces."""
    options = spec.cross_entropy
    if options is not None:
        return options.label_smoothing == 0.0 and not spec.extras
    return spec.kind != "divergence"


def _imported(family: str, backend: Backend) -> ModuleType:
    """The module of a family that needs Triton, which exists on Linux only."""
    try:
        return import_module(f"fastkl.kernels.{family}.triton")
    except ImportError as error:
        raise RuntimeError(
            f'backend is "{backend}", which needs triton >= 3.6 here, and it cannot be imported ({error}): install it, or '
            f'pass backend="torch"'
        ) from error
