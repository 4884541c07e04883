"""The cross-entropy of Liger-Kernel by `fastkl.loss` (`fastkl.integrations.liger`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkl.loss import Predictions, linear_cross_entropy, linear_logprobs

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class CrossEntropyOutput:
    """What was asked for beside the loss, detached; None where it was not."""

    loss: Tensor  # 0-dim, or [N] under reduction="none"
    z_loss: Tensor | None = None  # of the same shape, what lse_square_scale adds to the loss
    token_accuracy: Tensor | None = None  # of the same shape, float32; 0-dim: the mean over what is not ignored
    predicted_tokens: Tensor | None = None  # [N] int64, −1 where a target is ignored


@dataclass(eq=False, repr=False)
class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """The loss of this name in Liger-Kernel 0.8.5: the same arguments, the same results.

    A mean over nothing is 0, where Liger's token accuracy is NaN. z_loss is float32, where Liger has the dtype of _input.
    accum_dtype changes nothing: gradients are summed in float32 (float64 for float64). Token scaling costs one more product
    over the vocabulary.

    Raises ValueError for settings that do not fit, where Liger has an AssertionError.
    """

    ce_weight: Tensor | None = None
    ignore_index: int = -100
    lse_square_scale: float = 0.0
    label_smoothing: float = 0.0
    reduction: str = "mean"
    softcap: float | None = None
    return_z_loss: bool = False
    accum_dtype: torch.dtype | None = None
    use_token_scaling: bool = False
    return_token_accuracy: bool = False
    return_predicted_tokens: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}; use one of {', '.join(REDUCTIONS)}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must be in [0, 1]")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap is {self.softcap}; it must be > 0, or None")

    def forward(
        self,
        lin_weight: Tensor,  # [V, D]
        _input: Tensor,  # [N, D]
        target: Tensor,  # [N]
        bias: Tensor | None = None,  # [V]
    ) -> Tensor | CrossEntropyOutput:
        """The loss; a CrossEntropyOutput if one of the return_ settings is True."""
        if self.accum_dtype == torch.float64 != _input.dtype:
            raise ValueError(
                f"accum_dtype is torch.float64; gradients of {_input.dtype} are summed in float32: leave it out"
            )
        if target.shape != _input.shape[:-1]:
            raise ValueError(
                f"target is {list(target.shape)} but _input is {list(_input.shape)}: expected one id for each row, "
                f"{list(_input.shape[:-1])}"
            )
        valid = target != self.ignore_index
        count = valid.sum().clamp(min=1)
        scale = valid.float()
        if self.use_token_scaling:
            scale = self._probabilities(lin_weight, _input, target, bias).where(valid, 0.0)
        out = linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias=bias,
            softcap=self.softcap,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            class_weight=self._class_weight(len(lin_weight), target, valid, count),
            ignore_index=self.ignore_index,
            mask=scale,
            reduction="none" if self.reduction == "none" else "sum",
            per_token=True,
        )
        loss = out.loss / count if self.reduction == "mean" else out.loss
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        found = out.per_token
        assert isinstance(found, Predictions)
        z_loss = self.lse_square_scale * found.lse.square() * scale
        right = ((found.ids == target) & valid).float()
        if self.reduction != "none":
            z_loss, right = z_loss.sum() / (count if self.reduction == "mean" else 1), right.sum() / count
        return CrossEntropyOutput(
            loss,
            z_loss if self.return_z_loss else None,
            right if self.return_token_accuracy else None,
            found.ids if self.return_predicted_tokens else None,
        )

    def _class_weight(self, vocabulary: int, target: Tensor, valid: Tensor, count: Tensor) -> Tensor | None:
        """[V]. Of a mean the z-loss is divided by the count, the rest by the sum of the targets' weights."""
        if self.ce_weight is None:
            return None
        if self.ce_weight.shape != (vocabulary,):
            raise ValueError(
                f"ce_weight is {list(self.ce_weight.shape)}; expected a weight for each id of lin_weight, [{vocabulary}]"
            )
        if self.reduction != "mean":
            return self.ce_weight
        class_weight = self.ce_weight.detach().to(torch.promote_types(self.ce_weight.dtype, torch.float32))
        known = target.clamp(0, vocabulary - 1).long()  # other ids are refused with the rest of the call
        total = class_weight[known].where(valid, 0.0).sum()
        return class_weight * torch.where(total > 0, count / total, 0.0)

    @torch.no_grad()
    def _probabilities(self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        """p [N] of the targets, never 0: such a row would be left out."""
        logprobs = linear_logprobs(
            hidden, weight, target, bias=bias, softcap=self.softcap, ignore_index=self.ignore_index
        )
        return logprobs.exp().clamp(min=torch.finfo(logprobs.dtype).tiny)
