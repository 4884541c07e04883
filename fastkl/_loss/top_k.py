"""Distillation from a teacher that is known by its k likeliest tokens, as servers return them (`fastkl.loss`)."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.numbers import BadNumbers, check_logprobs, visible
from fastkl._loss.options import TopKOptions, takes
from fastkl._loss.output import LossOutput
from fastkl._loss.rows import divergence_output, flat_call
from fastkl.kernels.options import DIRECTIONS, TAILS


@takes(TopKOptions)
def top_k_kl_loss(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    teacher_ids: Tensor,  # [..., k] int64
    teacher_logprobs: Tensor,  # [..., k]
    **options: Unpack[TopKOptions],
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
    On an accelerator nobody looks at the ids: a list without one, or with one outside the vocabulary, makes its row NaN.
    A bias of −inf forbids a token outside the list, with a soft-cap or without. It forbids a listed token too, except under
    a soft-cap: the token's score is then −softcap, as in all other losses.
    The other arguments are those of the divergences (`fastkl.loss`). Formulas: `fastkl.kernels.top_k.formula`.

    Metrics, over the rows that take part: top_k_kl_mean, top_k_kl_max.
    """
    direction, tail = options["direction"], options["tail"]
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; use one of {', '.join(DIRECTIONS)}")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r}; use one of {', '.join(TAILS)}")
    call = flat_call(hidden, weight, options["tokens"], options, "top_k")
    ids, logprobs = _check_list(teacher_ids, teacher_logprobs, hidden)
    if visible(ids):
        _look_at_list(ids[call.active], logprobs[call.active], call.inputs.weight.shape[0])
    ids = torch.where(call.active[:, None], ids, _placeholder(ids))
    logprobs = logprobs.to(call.token_weights.dtype)
    call = call._replace(
        inputs=call.inputs._replace(top_ids=ids, top_logprobs=logprobs),
        spec=call.spec._replace(variant=f"{direction}-{tail}"),
    )
    factor = options["temperature"] ** 2 if options["squared_temperature"] else 1.0
    return divergence_output(call, "top_k_kl", factor)[0]


def _check_list(ids: Tensor, logprobs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-probs as [N, k]."""
    for name, tensor in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        check.check_tensor(name, tensor)
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
    k = ids.shape[-1]
    return ids.to(torch.int64).reshape(-1, k), logprobs.reshape(-1, k)


def _placeholder(ids: Tensor) -> Tensor:
    """The list of a row that is left out, [1, k]: a token and padding, since ids that stand twice have no order."""
    return torch.nn.functional.pad(ids.new_zeros(1, 1), (0, ids.shape[1] - 1), value=-1)


def _look_at_list(ids: Tensor, logprobs: Tensor, vocabulary: int) -> None:
    """What can only be seen in the numbers, of rows that take part, and so on a CPU alone."""
    if bool((ids[:, 0] < 0).any()):
        raise ValueError("teacher_ids has a row without any id; mask such tokens out")
    wrong = (ids < -1) | (ids >= vocabulary)
    if bool(wrong.any()):
        raise ValueError(
            f"teacher_ids holds {int(ids[wrong][0])}, outside the vocabulary (0 … {vocabulary - 1}; −1 pads)"
        )
    ordered = ids.sort(-1).values
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(again.any()):
        raise ValueError(f"teacher_ids lists {int(ordered[..., 1:][again][0])} twice in a row; each id once")
    check_logprobs("teacher_logprobs", logprobs, ids >= 0)
    mass = logprobs.exp().where(ids >= 0, 0.0).sum(-1)
    if bool((mass > 1.01).any()):
        raise BadNumbers(
            f"teacher_logprobs of a row sum to a probability of {float(mass.max()):.4g}; they must be log-probs over the "
            f"whole vocabulary, not logits"
        )
