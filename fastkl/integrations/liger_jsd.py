"""The distillation loss of Liger-Kernel by `fastkl.loss` (`fastkl.integrations.liger`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkl.loss import jsd_loss, linear_cross_entropy


@dataclass(eq=False, repr=False)
class LigerFusedLinearJSDLoss(torch.nn.Module):
    """The loss of this name in Liger-Kernel 0.8.5: weight_hard_loss · cross-entropy + weight_soft_loss · JSD(beta).

    The cross-entropy is that at temperature 1. Both are means over the labels that are not ignored. Hidden states, weight
    and bias of the student get gradients. `compiled` and `chunk_size` change nothing: fastkl chooses its chunks by memory.

    Raises ValueError if the two vocabularies differ. Liger gives a smaller student logits of 0 for the ids that it has not,
    which take probability.
    """

    weight_hard_loss: float = 0.5
    weight_soft_loss: float = 0.5
    beta: float = 0.5
    ignore_index: int = -100
    temperature: float = 1.0
    compiled: bool = True
    chunk_size: int = 1024
    return_soft_hard_loss: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def forward(
        self,
        student_input: Tensor,  # [N, D]
        student_weight: Tensor,  # [V, D]
        teacher_input: Tensor,  # [N, D_t]
        teacher_weight: Tensor,  # [V, D_t]
        true_labels: Tensor,  # [N]
        student_bias: Tensor | None = None,  # [V]
        teacher_bias: Tensor | None = None,  # [V]
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, 0-dim; with return_soft_hard_loss the JSD and the cross-entropy after it, detached."""
        if len(teacher_weight) != len(student_weight):
            smaller = min(len(teacher_weight), len(student_weight))
            raise ValueError(
                f"teacher_weight has {len(teacher_weight)} ids but student_weight {len(student_weight)}: cut both heads, "
                f"weight and bias, to the ids of the tokenizer, here at most {smaller}"
            )
        soft = jsd_loss(
            student_input,
            student_weight,
            teacher_input.detach(),
            teacher_weight.detach(),
            beta=self.beta,
            tokens=true_labels,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            bias=student_bias,
            teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        ).loss
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss != 0 or self.return_soft_hard_loss:
            heads = student_input, student_weight, true_labels
            hard = linear_cross_entropy(*heads, bias=student_bias, ignore_index=self.ignore_index).loss
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss
