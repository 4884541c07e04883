"""fastkl under TRL's trainers.

    from fastkl.integrations.trl import use

    use()  # once, before training; or `with use(): …`

TRL's trainers then compute with `fastkl.loss`: DistillationTrainer its divergence; SFTTrainer, GRPOTrainer, RLOOTrainer,
DPOTrainer, KTOTrainer, and whatever else calls `trl.trainer.utils.add_fused_lm_head`, their log-probs and entropies. Values
and gradients are TRL's own. docs/integrations.md says what stays as it is.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import trl
except ImportError as error:
    raise ImportError(f"fastkl.integrations.trl needs TRL 1.16 or later ({error}): pip install 'trl>=1.16'") from error

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastkl._loss.heads.operands import operands, whole
from fastkl.integrations.bindings import Part, put_in_place
from fastkl.loss import PerToken, jsd_loss, linear_logprobs, linear_token_stats

__all__ = ["use"]

MEAN_LOGITS_CHUNK = 1 << 25  # logits at a time, 128 MiB in float32


def use() -> ExitStack:
    """Puts fastkl under TRL's trainers, those that were imported or built before included. A second call changes nothing.

    Returns what undoes it: `use().close()`, or the end of `with use():`. A model keeps the fused head that TRL gave it,
    which calls whatever is in place when it runs.

    Raises RuntimeError, and changes nothing, if the installed TRL is not built as this needs.
    """
    return put_in_place("trl", f"TRL {trl.__version__}", "TRL 1.16", _PARTS)


def _divergence(
    student_hidden_states: Tensor,  # [..., D]
    teacher_hidden_states: Tensor,  # [..., D_t]
    student_lm_head_weight: Tensor,  # [V, D]
    teacher_lm_head_weight: Tensor,  # [V, D_t]
    completion_mask: Tensor,  # [...], 0 leaves a position out
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the sum of the student's entropies, and the number of positions, each 0-dim."""
    student = _head(student_hidden_states, student_lm_head_weight, student_lm_head_bias)
    with torch.no_grad():
        teacher = _head(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    numbers = temperature, student_logit_scale, teacher_logit_scale
    softcaps = student_final_logit_softcapping, teacher_final_logit_softcapping
    if not _known(numbers, softcaps) or len(student.weight) > len(teacher.weight):
        return NotImplemented
    active = completion_mask != 0
    count = active.sum()
    out = jsd_loss(
        student.hidden,
        student.weight,
        teacher.hidden.detach(),
        teacher.weight.detach(),
        bias=student.bias,
        teacher_bias=None if teacher.bias is None else teacher.bias.detach(),
        beta=beta,
        mask=active,
        temperature=temperature,
        logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        vocab_size=len(student.weight),  # TRL looks at no more of the teacher's
        reduction="sum",
        per_token=True,
    )
    assert isinstance(out.per_token, PerToken)
    divisor = (
        count.clamp(min=1)
        if num_items_in_batch is None
        else torch.as_tensor(num_items_in_batch, device=out.loss.device)
    )
    return out.loss / divisor, out.per_token.student_entropy.sum(), count


TokenFields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _token_fields(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N]
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> TokenFields:
    """Log-probs [N], and those fields that `outputs` names: entropies, log Σ p², mean logits, whether a target is top."""
    if not _known((temperature, logit_scale), (final_logit_softcapping,)):
        return NotImplemented
    head, wanted = _head(hidden, weight, bias), set(outputs)
    numbers = _Numbers(temperature, logit_scale, final_logit_softcapping)
    options = {"bias": head.bias, **numbers._asdict()}
    logprobs = entropies = log_sum_squares = top1 = None
    if wanted & {"entropy", "is_top1"}:
        later = "entropy" in wanted and _is_frozen(head) and not torch.compiler.is_compiling()
        entropy_grad = "entropy" in wanted and not later
        stats = linear_token_stats(head.hidden, head.weight, targets, entropy_grad=entropy_grad, **options)
        logprobs, entropies, top1 = stats.logprobs, stats.entropies, stats.top1
        if later:
            entropies = _EntropiesOfAFrozenHead.apply(head.hidden, head.weight, targets, options, entropies)
    else:
        logprobs = linear_logprobs(head.hidden, head.weight, targets, **options)
    if "log_sum_sq_probs" in wanted:
        log_sum_squares = _log_sum_squares(head, targets, numbers, logprobs)
    mean = _mean_logits(head, numbers) if "mean_logits" in wanted else None
    return (
        logprobs,
        entropies if "entropy" in wanted else None,
        log_sum_squares,
        mean,
        top1 if "is_top1" in wanted else None,
    )


class _Numbers(NamedTuple):
    """By the names of `fastkl.loss`."""

    temperature: float
    logit_scale: float
    softcap: float | None


class _Head(NamedTuple):
    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> _Head:
    """A head in the dtype of its input, as TRL casts it, or that of autocast; and whole: sharded weights are gathered."""
    bias = None if bias is None else whole(bias).to(hidden.dtype)
    return _Head(*operands(hidden, whole(weight).to(hidden.dtype), bias))


def _is_frozen(head: _Head) -> bool:
    parameters = (head.weight,) if head.bias is None else (head.weight, head.bias)
    return torch.is_grad_enabled() and head.hidden.requires_grad and not any(p.requires_grad for p in parameters)


class _EntropiesOfAFrozenHead(torch.autograd.Function):
    """Entropies whose gradient is made where a loss has them, which TRL's seldom have: most only log them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: dict[str, Any], entropies: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.options = options
        return entropies.view_as(entropies)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            entropies = linear_token_stats(leaf, weight, targets, **ctx.options).entropies
        return *torch.autograd.grad(entropies, leaf, above), None, None, None, None


@torch.no_grad()
def _log_sum_squares(head: _Head, targets: Tensor, numbers: _Numbers, logprobs: Tensor) -> Tensor:
    """log Σ p² [N]: at half the temperature the log-prob of any token is 2 log p − log Σ p²."""
    options = numbers._replace(temperature=numbers.temperature / 2)._asdict()
    return 2 * logprobs - linear_logprobs(head.hidden, head.weight, targets, bias=head.bias, **options)


@torch.no_grad()
def _mean_logits(head: _Head, numbers: _Numbers) -> Tensor:
    """Means [N] of the logits over the vocabulary, in float32. Without a soft-cap the weight's mean row gives them."""
    softcap = numbers.softcap
    if softcap is None:
        with torch.autocast(head.hidden.device.type, enabled=False):
            means = head.hidden.float() @ (head.weight.sum(0, dtype=torch.float32) / len(head.weight))
            means = means if head.bias is None else means + head.bias.float().mean()
        return means * (numbers.logit_scale / numbers.temperature)
    chunks = []
    for rows in head.hidden.split(max(1, MEAN_LOGITS_CHUNK // len(head.weight))):
        z = torch.nn.functional.linear(rows, head.weight, head.bias).float() * numbers.logit_scale
        chunks.append(softcap * torch.tanh(z / softcap).mean(-1) / numbers.temperature)
    return torch.cat(chunks)


def _known(positive: tuple[float, ...], softcaps: tuple[float | None, ...]) -> bool:
    """Whether fastkl takes such a call. Weights that DeepSpeed's ZeRO-3 partitions are gathered by TRL's own code only."""
    return (
        not is_deepspeed_zero3_enabled()
        and all(number > 0 for number in positive)
        and all(softcap is None or softcap > 0 for softcap in softcaps)
    )


_PARTS = (
    Part("trl.trainer.distillation_trainer", "_chunked_divergence_loss", _divergence),
    Part("trl.trainer.utils", "_ChunkedLogProbFunction", _token_fields),
)
