"""Divergences between student and teacher over the whole vocabulary (`fastkl.loss`)."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.output import LossOutput, PerToken
from fastkl._loss.rows import divergence_output, rows_of
from fastkl._loss.teacher import Teacher, check_teacher, common_ids
from fastkl.kernels.divergence.formula import Divergence, Outputs
from fastkl.kernels.problem import Backend, Inputs, Spec, TeacherChunks
from fastkl.kernels.sparse.estimator import Backward


class DivergenceOptions(TypedDict, total=False):
    """Keyword arguments of every divergence; see `fastkl.loss`."""

    teacher_logits: Tensor | TeacherChunks | None
    tokens: Tensor | None
    mask: Tensor | None
    vocab_size: int | None
    temperature: float
    teacher_temperature: float | None
    squared_temperature: bool
    per_token: bool
    reduction: str
    normalizer: Tensor | float | None
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    teacher_bias: Tensor | None
    teacher_logit_scale: float
    teacher_softcap: float | None
    ignore_index: int
    chunk_size: int | None
    skip_zero_rows: bool
    backend: Backend
    backward: Backward
    weight_grad: Tensor | None


def reverse_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """KL(student ‖ teacher) = Σ p (log p − log q): mode-seeking, what on-policy distillation minimises.

    A token that the student can emit and the teacher cannot (q = 0 < p) makes it infinite. Equals
    `(p * (log_softmax(z) - log_softmax(z_teacher))).sum(-1)` per token. Options: `fastkl.loss`, "Divergences".
    """
    teacher = teacher_hidden, teacher_weight
    return _divergence("reverse_kl", "reverse_kl", 0.0, 1.0, student_hidden, student_weight, *teacher, **options)


def forward_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """KL(teacher ‖ student) = Σ q (log q − log p): mass-covering, classic distillation (Hinton et al., 2015).

    Equals `(q * (log_softmax(z_teacher) - log_softmax(z))).sum(-1)` per token. Options: `fastkl.loss`, "Divergences".
    """
    teacher = teacher_hidden, teacher_weight
    return _divergence("forward_kl", "forward_kl", 0.0, 1.0, student_hidden, student_weight, *teacher, **options)


def jsd_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    beta: float = 0.5,
    normalized: bool = False,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """Generalised Jensen-Shannon divergence β KL(q ‖ m) + (1 − β) KL(p ‖ m), m = β q + (1 − β) p (Agarwal et al., 2024).

    The convention of TRL and Liger: β = 0 is *defined* as the forward KL(q ‖ p) and β = 1 as the reverse KL(p ‖ q), value
    and gradient. The formula itself tends to 0 at both ends, so that the loss jumps there. `normalized` divides by
    β (1 − β), which makes it continuous: JSD / (β (1 − β)) tends to the forward KL as β → 0, to the reverse as β → 1.

    beta in [0, 1]. At most β log(1/β) + (1 − β) log(1/(1 − β)) and finite for any two distributions if 0 < β < 1.
    Options: `fastkl.loss`, "Divergences".
    """
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it must be in [0, 1] (0: forward KL, 1: reverse KL)")
    teacher = teacher_hidden, teacher_weight
    if beta in (0.0, 1.0):
        end: Divergence = "forward_kl" if beta == 0.0 else "reverse_kl"
        return _divergence("jsd", end, 0.0, 1.0, student_hidden, student_weight, *teacher, **options)
    factor = 1.0 / (beta * (1.0 - beta)) if normalized else 1.0
    return _divergence("jsd", "jsd", beta, factor, student_hidden, student_weight, *teacher, **options)


def skewed_forward_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    alpha: float = 0.1,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """KL(q ‖ α q + (1 − α) p), the skew KL of DistiLLM (Ko et al., 2024); α in [0, 1), 0: the forward KL.

    At most log(1/α). Options: `fastkl.loss`, "Divergences".
    """
    _check_alpha(alpha)
    teacher = teacher_hidden, teacher_weight
    kind: Divergence = "skewed_forward_kl" if alpha > 0.0 else "forward_kl"
    return _divergence("skewed_forward_kl", kind, alpha, 1.0, student_hidden, student_weight, *teacher, **options)


def skewed_reverse_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    alpha: float = 0.1,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """KL(p ‖ α p + (1 − α) q), the skew reverse KL of DistiLLM (Ko et al., 2024); α in [0, 1), 0: the reverse KL.

    At most log(1/α). Options: `fastkl.loss`, "Divergences".
    """
    _check_alpha(alpha)
    teacher = teacher_hidden, teacher_weight
    kind: Divergence = "skewed_reverse_kl" if alpha > 0.0 else "reverse_kl"
    return _divergence("skewed_reverse_kl", kind, alpha, 1.0, student_hidden, student_weight, *teacher, **options)


def total_variation_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """½ Σ |p − q|, in [0, 1]; where p = q its subgradient is 0. Options: `fastkl.loss`, "Divergences"."""
    teacher = teacher_hidden, teacher_weight
    return _divergence(
        "total_variation", "total_variation", 0.0, 1.0, student_hidden, student_weight, *teacher, **options
    )


def _divergence(
    name: str,
    divergence: Divergence,
    parameter: float,
    factor: float,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    teacher_logits: Tensor | TeacherChunks | None = None,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    squared_temperature: bool = False,
    per_token: bool = False,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
    backward: Backward = "exact",
    weight_grad: Tensor | None = None,
) -> LossOutput:
    """factor · the divergence, reduced; its metrics under `name`."""
    reduce = check.check_reduction(reduction, normalizer)
    student_options = check.head_options(temperature, logit_scale, softcap)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    teacher_options = check.head_options(teacher_temperature, teacher_logit_scale, teacher_softcap, "teacher_")
    check.check_head(student_hidden, student_weight, bias, "student_")
    check.check_plan(backend, chunk_size, student_weight, weight_grad)
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits)
    check_teacher(teacher, student_hidden, student_weight, vocab_size)
    teacher, weight, bias, weight_grad = common_ids(teacher, student_weight, bias, weight_grad, vocab_size)
    hidden, weight, bias = check.autocast(student_hidden, weight, bias)
    if teacher.hidden is not None and teacher.weight is not None:
        teacher = Teacher(*check.autocast(teacher.hidden, teacher.weight, teacher.bias), None)
    sparse = check.sparse(backward)
    how = backend, chunk_size, divergence, parameter, per_token, sparse
    spec = Spec("divergence", student_options, teacher_options, *how)

    rows = rows_of(mask, tokens, hidden, weight.shape[0], ignore_index)
    inputs = Inputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        rows.tokens,
        *teacher.flat(weight.shape[0], exactly=vocab_size is None),
    )
    factor = factor * temperature**2 if squared_temperature else factor
    output, values = divergence_output(
        name, factor, reduce, spec, inputs, rows, skip_zero_rows, hidden.shape[:-1], weight_grad
    )
    return output._replace(per_token=_per_token(values, tokens is not None))


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1): at 1 both sides of the divergence are the same")


def _per_token(values: Tensor, tokens: bool) -> PerToken | None:
    """The by-products among values [K, ...]; None if they were not asked for."""
    _, token_nll, extras = Outputs.of(values)
    if extras is None:
        return None
    teacher_nll, *others = extras
    return PerToken(-token_nll if tokens else None, -teacher_nll if tokens else None, *others)
