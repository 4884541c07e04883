"""The GRPO losses of Liger-Kernel by `fastkl.loss` (`fastkl.integrations.liger`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkl.integrations import grpo_terms
from fastkl.integrations.grpo_terms import Batch
from fastkl.loss import linear_logprobs, policy_gradient_loss

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")
OF_TOKENS = ("cispo", "sapo", "vespo")  # have no ratio of a whole sequence
IGNORED = -100


@dataclass(eq=False, repr=False)
class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The loss of this name in Liger-Kernel 0.8.5: the same arguments, the same results.

    Hidden states, weight and bias get gradients: in one pass over the vocabulary where `policy_gradient_loss` has such a
    loss, else by way of `linear_logprobs`. The one pass clamps log-ratios to ±20. `compiled` and `chunk_size` change
    nothing: fastkl chooses its chunks by memory.

    Raises ValueError for settings that do not go together, as Liger does, there in part as AssertionError.
    """

    beta: float = 0.04
    compiled: bool = True
    use_ref_model: bool = True
    chunk_size: int = 1
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    loss_type: str = "dapo"
    max_completion_length: int | None = None
    importance_sampling_level: str = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    temperature: float = 1.0
    delta: float | None = None
    use_bias_correction_kl: bool = False
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "delta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be > 0")
        self._check()

    def forward(
        self,
        _input: Tensor,  # [B, T, D]
        lin_weight: Tensor,  # [V, D]
        selected_token_ids: Tensor,  # [B, T]
        attention_mask: Tensor,  # [B, T], 1 or 0
        advantages: Tensor,  # [B]
        bias: Tensor | None = None,  # [V]
        ref_per_token_logps: Tensor | None = None,  # [B, T]
        old_per_token_logps: Tensor | None = None,  # [B, T]
        ref_input: Tensor | None = None,  # [B, T, D_ref]
        ref_weight: Tensor | None = None,  # [V, D_ref]
        ref_bias: Tensor | None = None,  # [V]
        vllm_is_ratio: Tensor | None = None,  # [B], [B, 1] or [B, T]
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and a tuple: the mean KL estimate if beta is not 0, and the share of tokens that are clipped."""
        self._check()
        ref = None
        if self.beta != 0.0 and self.use_ref_model:
            ref = ref_per_token_logps
            if ref is None:
                ref = self._reference(ref_input, ref_weight, ref_bias, selected_token_ids)
        batch = Batch.of(self, attention_mask, advantages, old_per_token_logps, ref, vllm_is_ratio)
        weights = grpo_terms.token_weights(self, batch, num_items_in_batch)
        tokens = selected_token_ids.masked_fill(~batch.counted, IGNORED)
        head: dict[str, Any] = {"bias": bias, "temperature": self.temperature}
        if self._fits_one_pass():
            corrected = batch.advantages if batch.corrections is None else batch.advantages * batch.corrections
            out = policy_gradient_loss(
                _input,
                lin_weight,
                tokens,
                corrected.expand_as(batch.mask),
                batch.old,
                ref_logprobs=batch.ref,
                ref_kl_coef=0.0 if batch.ref is None else self.beta,
                ref_kl_ratio=self.use_bias_correction_kl and batch.ref is not None,
                mask=weights,
                reduction="sum",
                **self._clip(),
                **head,
            )
            assert out.logprobs is not None
            return out.loss, grpo_terms.metrics(self, out.logprobs, batch)
        logprobs = linear_logprobs(_input, lin_weight, tokens, **head)
        loss = (grpo_terms.losses(self, logprobs, batch) * weights).sum()
        return loss, grpo_terms.metrics(self, logprobs.detach(), batch)

    def _fits_one_pass(self) -> bool:
        """Whether `policy_gradient_loss` has this loss. Under a ratio of sequences it would make the logits twice too."""
        if self.importance_sampling_level == "sequence" or self.loss_type in ("sapo", "vespo"):
            return False
        if min(self.beta, self.epsilon_low, self.epsilon_high) < 0:
            return False
        if self.loss_type == "cispo":
            return self.epsilon_high >= 1.0
        return self.delta is None or self.delta >= max(1.0 + self.epsilon_high, 1.0 + 1e-6)

    def _clip(self) -> dict[str, Any]:
        if self.loss_type == "cispo":  # whose epsilon_high is the bound itself, and which has no lower one
            return {"method": "cispo", "clip_low": 1.0, "clip_high": self.epsilon_high - 1.0}
        return {
            "method": "ppo",
            "clip_low": min(self.epsilon_low, 1.0),  # ratios are > 0: no lower bound is another one
            "clip_high": self.epsilon_high,
            "dual_clip": self.delta,
        }

    def _reference(self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, tokens: Tensor) -> Tensor:
        """The reference model's log-probs [B, T]."""
        if hidden is None or weight is None:
            raise ValueError(
                f"beta is {self.beta} and use_ref_model is True: give ref_per_token_logps, or ref_input and ref_weight"
            )
        with torch.no_grad():
            return linear_logprobs(hidden, weight, tokens, bias=bias, temperature=self.temperature)

    def _check(self) -> None:
        """What goes together; at each call, since the attributes may have changed."""
        level, kind = self.importance_sampling_level, self.loss_type
        if kind not in LOSS_TYPES:
            raise ValueError(f"loss_type is {kind!r}; use one of {', '.join(LOSS_TYPES)}")
        if level not in LEVELS:
            raise ValueError(f"importance_sampling_level is {level!r}; use one of {', '.join(LEVELS)}")
        if level == "sequence" and kind in OF_TOKENS:
            raise ValueError(f"loss_type is {kind!r}, which has no importance_sampling_level 'sequence': use 'token'")
        if kind == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("loss_type is 'dr_grpo', which divides by max_completion_length: give it")
