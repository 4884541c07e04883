"""Divergences between student and teacher over the whole vocabulary (`fastkl.loss`)."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.heads.shares import is_part
from fastkl._loss.numbers import check_teacher_gave_numbers
from fastkl._loss.options import DivergenceOptions, record, takes
from fastkl._loss.output import LossOutput
from fastkl._loss.rows import divergence_output, flat_call
from fastkl._loss.teacher import Teacher, check_teacher
from fastkl.kernels.divergence.formula import (
    Divergence,
    Outputs,
    PerToken,
    check_alpha,
    check_beta,
    check_power,
    effective_kind,
)
from fastkl.kernels.problem import HeadOptions

__all__ = [
    "density_power_loss",
    "forward_kl_loss",
    "jsd_loss",
    "reverse_kl_loss",
    "skewed_forward_kl_loss",
    "skewed_reverse_kl_loss",
    "total_variation_loss",
]


@takes(DivergenceOptions)
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
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("reverse_kl", 0.0, *heads, options)


@takes(DivergenceOptions)
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
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("forward_kl", 0.0, *heads, options)


@takes(DivergenceOptions)
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
    It divides the loss alone: the metrics jsd_mean and jsd_max are of the divergence itself.

    beta in [0, 1]. At most β log(1/β) + (1 − β) log(1/(1 − β)) and finite for any two distributions if 0 < β < 1.
    Options: `fastkl.loss`, "Divergences".
    """
    check_beta(beta)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    factor = 1.0 / (beta * (1.0 - beta)) if normalized and 0.0 < beta < 1.0 else 1.0
    return _divergence("jsd", beta, *heads, options, factor)


@takes(DivergenceOptions)
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
    check_alpha(alpha)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("skewed_forward_kl", alpha, *heads, options)


@takes(DivergenceOptions)
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
    check_alpha(alpha)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("skewed_reverse_kl", alpha, *heads, options)


@takes(DivergenceOptions)
def total_variation_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """½ Σ |p − q|, in [0, 1]; where p = q its subgradient is 0. Options: `fastkl.loss`, "Divergences"."""
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("total_variation", 0.0, *heads, options)


@takes(DivergenceOptions)
def density_power_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor | None = None,  # [..., D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    power: float = 1.0,
    **options: Unpack[DivergenceOptions],
) -> LossOutput:
    """Density power divergence Σ [p¹⁺ᵅ / (1 + α) − p qᵅ + α q¹⁺ᵅ / (1 + α)] / α, α = power (Basu et al., 1998).

    What the bounded rewards of `reverse_kl_advantages(…, power=α)` minimise on average, over the whole vocabulary: the
    gradient by the logits is p (s − Σ p s) with s = (pᵅ − qᵅ) / α. Basu's data density is the student here. The divergence
    is divided by α, so that α → 0 is the reverse KL, and power=0 is exactly that. power=1 is ½ Σ (p − q)².

    power in [0, 1000]. At most 1/α, finite for any two distributions if α > 0. Where both p and q are small so is what they
    add: the larger α, the less the tails count. Options: `fastkl.loss`, "Divergences".
    """
    check_power(power)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return _divergence("density_power", power, *heads, options)


def _divergence(
    kind: Divergence,
    parameter: float,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    options: DivergenceOptions,
    factor: float = 1.0,
) -> LossOutput:
    """factor · the divergence, reduced; its metrics under the name of its kind."""
    vocab_size, temperature = options["vocab_size"], options["temperature"]
    part = is_part(options["group"])
    check.check_head(student_hidden, student_weight, options["bias"], "student_", part=part)
    teacher = Teacher(teacher_hidden, teacher_weight, options["teacher_bias"], options["teacher_logits"])
    check_teacher(teacher, student_hidden, student_weight, vocab_size, part)
    call = flat_call(student_hidden, student_weight, options["tokens"], options, "divergence", "student_")
    if options["teacher_temperature"] is None:
        options = {**options, "teacher_temperature": temperature}
    call = call._replace(
        inputs=teacher.join(call.inputs, vocab_size, call.piece),
        spec=call.spec._replace(
            teacher=record(HeadOptions, options, "teacher_"),
            variant=effective_kind(kind, parameter),
            parameter=parameter,
            extras=options["per_token"],
        ),
    )
    factor = factor * temperature**2 if options["squared_temperature"] else factor
    output, values = divergence_output(call, kind, factor)
    check_teacher_gave_numbers(call.inputs, values[0].reshape(-1), call.spec.share)
    return output._replace(per_token=_per_token(values, options["tokens"] is not None))


def _per_token(values: Tensor, tokens: bool) -> PerToken | None:
    """The by-products among values [K, ...]; None if they were not asked for."""
    _, token_nll, by_products, _ = Outputs.of(values)
    if not by_products:
        return None
    per_token = PerToken(-token_nll, **by_products)
    return per_token if tokens else per_token._replace(student_logprobs=None, teacher_logprobs=None)
