"""Divergences between student and teacher over the whole vocabulary (`fastkl.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl import _arguments as check
from fastkl._output import LossOutput, masked_extreme, masked_mean
from fastkl.kernels.autograd import row_values, summed_loss
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.problem import Backend, Inputs, Objective, Spec


def reverse_kl_loss(
    student_hidden: Tensor,  # [..., D]
    student_weight: Tensor,  # [V, D]
    teacher_hidden: Tensor,  # [..., D_t]
    teacher_weight: Tensor,  # [V, D_t]
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
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
    weight_grad: Tensor | None = None,
) -> LossOutput:
    """Exact reverse KL(student ‖ teacher) = Σ p (log p − log q) over the whole vocabulary, mean over tokens by default.

    Equals `(p * (log_softmax(z) - log_softmax(z_teacher))).sum(-1)` per token, both sides at the same temperature (no T²
    factor). Hidden sizes may differ; vocabularies may not. The teacher gets no gradient: asking for one is an error.

    tokens    [...], optional: where it is `ignore_index` the row takes no part; the others' student log-probs are
              returned in `logprobs` (None without tokens).
    mask      [...], bool or weights ≥ 0.
    bias, logit_scale, softcap and their teacher_ twins describe the two heads.

    Metrics, over the rows that take part: reverse_kl_mean, reverse_kl_max.
    """
    reduce = check.check_reduction(reduction, normalizer)
    student_options = check.head_options(temperature, logit_scale, softcap)
    teacher_options = check.head_options(temperature, teacher_logit_scale, teacher_softcap, "teacher_")
    check.check_head(student_hidden, student_weight, bias, "student_")
    check.check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_")
    check.check_plan(backend, chunk_size, student_weight, weight_grad)
    _check_teacher(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias)
    hidden, weight, bias = check.autocast(student_hidden, student_weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = check.autocast(teacher_hidden, teacher_weight, teacher_bias)
    spec = Spec("reverse_kl", student_options, teacher_options, backend, chunk_size)

    dtype = compute_dtype(hidden.dtype)
    share, y = check.mask_weights(mask, hidden, dtype), None
    if tokens is not None:
        y = check.check_tokens(tokens, hidden, weight.shape[0], ignore_index).reshape(-1)
        share = share.where(y != ignore_index, 0.0)
    active = share != 0
    rows = active if skip_zero_rows else None
    inputs = Inputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        None if y is None else y.where(active, 0),
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight,
        teacher_bias,
    )
    if reduction == "none":
        values = row_values(spec, inputs, rows, None, weight_grad)
        loss = (values[0] * share).reshape(hidden.shape[:-1])
    else:
        total, values = summed_loss(spec, inputs, Objective(share), rows, None, weight_grad)
        loss = total * reduce.factor(share)
    kl, nll = (v.where(active, 0.0) for v in values.detach())
    metrics = {"reverse_kl_mean": masked_mean(kl, active), "reverse_kl_max": masked_extreme(kl, active, largest=True)}
    return LossOutput(loss, None if y is None else -nll.reshape(hidden.shape[:-1]), metrics)


def _check_teacher(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, bias: Tensor | None
) -> None:
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (teacher_hidden, teacher_weight, bias)
    ):
        raise ValueError(
            "the teacher requires a gradient, and reverse_kl_loss has none for it: run the teacher under torch.no_grad() "
            "or pass detached tensors (teacher_weight.detach())"
        )
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden is {list(teacher_hidden.shape)} but student_hidden is {list(student_hidden.shape)}: "
            f"expected the same tokens, {list(student_hidden.shape[:-1])}"
        )
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"teacher_weight has a vocabulary of {teacher_weight.shape[0]} but student_weight one of "
            f"{student_weight.shape[0]}; if one is a padded version of the other, cut both to the common ids "
            f"(weight[:V]); never pad with zeros, which is a logit of 0 and takes probability"
        )
    check.check_device("teacher_hidden", teacher_hidden, student_hidden, "student_hidden")
    if compute_dtype(teacher_hidden.dtype) != compute_dtype(student_hidden.dtype):
        raise TypeError(
            f"teacher_hidden is {teacher_hidden.dtype} but student_hidden is {student_hidden.dtype}; float64 goes with "
            f"float64 only"
        )
