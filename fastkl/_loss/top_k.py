"""Distillation from a teacher that is known by its k likeliest tokens, as servers return them (`fastkl.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl._loss import arguments as check
from fastkl._loss.output import LossOutput
from fastkl._loss.rows import divergence_output, rows_of
from fastkl.kernels.gemm import compute_dtype
from fastkl.kernels.problem import Backend, Inputs, Spec
from fastkl.kernels.sparse.estimator import Backward
from fastkl.kernels.top_k.formula import DIRECTIONS, TAILS, Direction, Tail


def top_k_kl_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    teacher_ids: Tensor,  # [..., k] int64
    teacher_logprobs: Tensor,  # [..., k]
    *,
    direction: Direction = "reverse",
    tail: Tail = "bucket",
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    squared_temperature: bool = False,
    reduction: str = "mean",
    normalizer: Tensor | float | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    skip_zero_rows: bool = True,
    backend: Backend = "auto",
    backward: Backward = "exact",
    weight_grad: Tensor | None = None,
) -> LossOutput:
    """KL divergence to a teacher of which only the k likeliest tokens are known; the student's side is exact.

    teacher_ids       [..., k], distinct ids of a row; −1 pads at the end of a row. One that takes part has an id at least.
    teacher_logprobs  [..., k], as the teacher normalised them over its whole vocabulary, at the temperature of this call.
    direction         "reverse", KL(student ‖ teacher), or "forward", KL(teacher ‖ student).
    tail              what becomes of the tokens that are not listed:
                      "bucket": one outcome of the teacher's remaining mass 1 − Σ q, on both sides. A lower bound of the
                      true divergence, 0 where student and teacher agree.
                      "renormalise": the teacher has nothing outside the list. Within it the divergence of both sides
                      renormalised, and −log of the student's mass within it on top, which makes leaving the list cost.
                      "drop": the terms of the listed tokens alone, as they are. Biased, and no divergence: it may be
                      negative, and in the reverse direction the student pays nothing for what is not listed.
    A bias of −inf counts as forbidden outside the list; under a soft-cap elsewhere it is a score of −softcap.
    The other arguments are those of the divergences (`fastkl.loss`). Formulas: `fastkl.kernels.top_k.formula`.

    Metrics, over the rows that take part: top_k_kl_mean, top_k_kl_max.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; use one of {', '.join(DIRECTIONS)}")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; use one of {', '.join(TAILS)}")
    reduce = check.check_reduction(reduction, normalizer)
    options = check.head_options(temperature, logit_scale, softcap)
    check.check_head(hidden, weight, bias)
    check.check_plan(backend, chunk_size, weight, weight_grad)
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, {"weight": weight.shape[0]})
        weight = weight[:vocab_size]
        bias, weight_grad = check.first_rows(bias, vocab_size), check.first_rows(weight_grad, vocab_size)
    ids, listed = _check_list(teacher_ids, teacher_logprobs, hidden, weight.shape[0])
    hidden, weight, bias = check.autocast(hidden, weight, bias)
    sparse = check.sparse(backward)
    spec = Spec("top_k", options, None, backend, chunk_size, f"{direction}-{tail}", sparse=sparse)

    rows = rows_of(mask, tokens, hidden, weight.shape[0], ignore_index)
    if ids.is_cpu and not torch.compiler.is_compiling() and bool((rows.active & (ids[:, 0] < 0)).any()):
        raise ValueError("teacher_ids has a row without any id; mask such tokens out")
    inputs = Inputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        rows.tokens,
        top_ids=ids.where(rows.active[:, None], 0),
        top_logprobs=listed.to(compute_dtype(hidden.dtype)),
    )
    factor = temperature**2 if squared_temperature else 1.0
    output, _ = divergence_output(
        "top_k_kl", factor, reduce, spec, inputs, rows, skip_zero_rows, hidden.shape[:-1], weight_grad
    )
    return output


def _check_list(ids: Tensor, logprobs: Tensor, hidden: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs as [N, k]."""
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        if tensor.dim() != hidden.dim() or tensor.shape[:-1] != hidden.shape[:-1] or tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} is {list(tensor.shape)} but hidden is {list(hidden.shape)}: expected k entries per token, "
                f"{[*hidden.shape[:-1], 'k']}"
            )
        check.check_device(name, tensor, hidden, "hidden")
    if ids.shape != logprobs.shape:
        raise ValueError(f"teacher_ids is {list(ids.shape)} but teacher_logprobs is {list(logprobs.shape)}")
    check.check_integers("teacher_ids", ids)
    if not logprobs.is_floating_point():
        raise TypeError(f"teacher_logprobs is {logprobs.dtype}; expected floating-point log-probs")
    if logprobs.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_logprobs requires a gradient, and top_k_kl_loss has none for it: detach it")
    ids = ids.to(torch.int64)
    if ids.is_cpu and not torch.compiler.is_compiling():
        _look_at_list(ids, logprobs, vocabulary)
    k = ids.shape[-1]
    return ids.reshape(-1, k), logprobs.reshape(-1, k)


def _look_at_list(ids: Tensor, logprobs: Tensor, vocabulary: int) -> None:
    """What can only be seen in the numbers, and so on a CPU alone."""
    wrong = (ids < -1) | (ids >= vocabulary)
    if bool(wrong.any()):
        raise ValueError(
            f"teacher_ids holds {int(ids[wrong][0])}, outside the vocabulary of weight (0 … {vocabulary - 1}; −1 pads)"
        )
    ordered = ids.sort(-1).values
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(again.any()):
        raise ValueError(f"teacher_ids lists {int(ordered[..., 1:][again][0])} twice in a row; each id once")
    mass = logprobs.exp().where(ids >= 0, 0.0).sum(-1)
    if bool((mass > 1.01).any()):
        raise ValueError(
            f"teacher_logprobs of a row sum to a probability of {float(mass.max()):.4g}; they must be log-probs over the "
            f"whole vocabulary, not logits"
        )
