"""What can only be seen in the numbers: looked at on a CPU alone, where it costs next to nothing.

On an accelerator a look is a synchronisation, and in a compiled graph nothing can be raised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels.problem import Inputs
from fastkl.kernels.rows.parallel.share import Share, gathered

ROUNDING = 0.01  # a log-prob of a certain token, from a server that rounds it, may be so far above 0


class BadNumbers(ValueError):
    """Log-probs above 0, or a teacher that gives NaN: the shapes fit and the numbers do not."""


def visible(tensor: Tensor) -> bool:
    """May its numbers be looked at?"""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def check_logprobs(name: str, logprobs: Tensor, active: Tensor | None = None) -> None:
    """Refuses NaN and what is above 0 in log-probs, but where they are not `active` (bool, of their shape)."""
    if not visible(logprobs) or logprobs.numel() == 0:
        return
    counted = logprobs.detach() if active is None else logprobs.detach().where(active, 0.0)
    largest = float(counted.amax())  # NaN if one is
    if largest <= ROUNDING:
        return
    if largest != largest:
        raise BadNumbers(f"{name} holds NaN where the mask is not 0: find what gave it, or mask those tokens out")
    raise BadNumbers(
        f"{name} holds {largest:.4g}, and the log of a probability is at most 0: are these probabilities or logits? Give "
        f"log-probs, in nats"
    )


def check_teacher_gave_numbers(inputs: Inputs, values: Tensor, share: Share | None) -> None:
    """Refuses NaN and +inf of a teacher where they made a value [N] of a divergence NaN; a student's NaN is let through.

    All processes that share the vocabulary refuse what one of them finds: the values are the same on all.
    """
    if not visible(values) or not bool(values.isnan().any()):
        return
    row = values.isnan().nonzero()[:1, 0]
    logits = inputs.teacher_logits
    given = {
        "teacher_hidden": None if inputs.teacher_hidden is None else inputs.teacher_hidden[row],
        "teacher_weight": inputs.teacher_weight,
        "teacher_bias": inputs.teacher_bias,
        "teacher_logits": None if logits is None else logits(row) if callable(logits) else logits[row],
    }
    found = torch.tensor([t is not None and bool((t.isnan() | (t == torch.inf)).any()) for t in given.values()])
    if share is not None:
        found = gathered(share.group, found.to(torch.uint8)).any(0)
    for name, bad in zip(given, found.tolist(), strict=True):
        if bad:
            raise BadNumbers(
                f"{name} holds NaN or +inf, at row {int(row)} of the flattened tokens first: find what made the teacher "
                f"give it, or mask those tokens out"
            )
