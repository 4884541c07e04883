"""What was probably meant by an argument that does not fit: the end of an error message, or nothing."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.kernels.problem import Inputs

# What other libraries call an argument, and the losses of the other family.
OTHER_NAMES = {
    ("hidden", "hidden_states", "last_hidden_state", "student_input", "_input"): "student_hidden",
    ("student_hidden", "hidden_states", "last_hidden_state", "_input"): "hidden",
    ("weight", "lm_head_weight", "lin_weight", "linear_weight"): "student_weight",
    ("student_weight", "lm_head_weight", "lin_weight", "linear_weight"): "weight",
    ("labels", "target", "targets", "target_ids", "input_ids", "completion_ids", "selected_token_ids"): "tokens",
    ("labels", "target", "tokens", "target_ids", "input_ids", "completion_ids"): "targets",
    ("ce_weight", "class_weights", "weights"): "class_weight",
    ("weight_hard_loss", "hard_loss_weight", "ce_coef", "ce_weight"): "hard_coef",
    ("lse_square_scale", "z_loss_weight", "z_loss_coef", "z_loss_multiplier"): "z_loss",
    ("attention_mask", "loss_mask", "completion_mask", "response_mask", "weights"): "mask",
    ("advantage",): "advantages",
    ("old_per_token_logps", "old_log_probs", "sampler_logprobs", "sampling_logprobs"): "old_logprobs",
    ("old_logprobs", "old_log_probs", "student_logprobs", "sampling_logprobs"): "sampler_logprobs",
    ("ref_logprobs", "ref_per_token_logps", "teacher_logps", "teacher_log_probs"): "teacher_logprobs",
    ("ref_per_token_logps", "ref_log_probs", "ref_log_prob", "reference_policy_logprobs"): "ref_logprobs",
    ("beta", "kl_coef", "kl_loss_coef", "reference_policy_kl_penalty"): "ref_kl_coef",
    ("use_bias_correction_kl", "use_importance_sampling_correction_kl"): "ref_kl_ratio",
    ("token_logprobs", "sampled_teacher_logprobs", "teacher_token_logprobs"): "token_teacher_logprobs",
    ("delta", "clip_ratio_c", "ratio_clip_c"): "dual_clip",
    ("importance_sampling_level",): "ratio",
    ("num_items_in_batch", "num_tokens"): "normalizer",
    ("return_lse", "return_predicted_tokens", "return_token_accuracy"): "per_token",
    ("final_logit_softcapping", "logit_softcapping"): "softcap",
    ("epsilon_low",): "clip_low",
    ("epsilon_high",): "clip_high",
}
HIDDEN = "what the LM head receives (fastkl.head.fuse hands it over)"


def of_keyword(name: str, known: Collection[str], function: str) -> str:
    """For a keyword that a function does not take."""
    meant = [ours for theirs, ours in OTHER_NAMES.items() if name in theirs and ours in known]
    if meant or (meant := difflib.get_close_matches(name, known, 1, 0.75)):
        return f"; did you mean {meant[0]}?"
    if "logits" in name:
        return f"; it takes hidden states, {HIDDEN}, in place of logits"
    return f"; help(fastkl.loss.{function}) lists what it takes"


def of_type(value: Any) -> str:
    """For what is no tensor."""
    if isinstance(value, nn.Module) and isinstance(getattr(value, "weight", None), Tensor):
        return "; pass its .weight"
    if hasattr(value, "logits") or hasattr(value, "last_hidden_state"):
        return f"; pass hidden states, {HIDDEN}"
    if hasattr(value, "loss"):
        return "; pass its .loss"
    return "; make it one with torch.as_tensor" if hasattr(value, "__len__") else ""


def of_head(hidden: Tensor, weight: Tensor, who: str) -> str:
    """For hidden states [..., D] that do not fit a weight [V, D]."""
    logits = hidden.dim() > 0 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[0] > weight.shape[1]
    if logits and who == "teacher_":
        return "; teacher_hidden looks like logits: give them alone, as teacher_logits="
    if logits:
        return f"; {who}hidden looks like logits: pass {HIDDEN}"
    if weight.dim() > 2:
        return (
            f"; {who}weight looks like logits: the losses take hidden states and a head (fastkl.reference takes logits)"
        )
    return ""


def of_tokens(name: str, tensor: Tensor, hidden: Tensor) -> str:
    """For a tensor [...] with an entry per token that hidden states [..., D] do not have."""
    if name.endswith("advantages") and hidden.dim() > 2:
        return f", or one per row, {list(hidden.shape[:-2])}"
    if tensor.shape[:-1] == hidden.shape[:-1] and tensor.is_floating_point():
        return "; forward_kl_loss takes a distribution, as teacher_logits=" if name == "targets" else ""
    if tensor.dim() == 0 or tensor.shape[:-1] != hidden.shape[:-2]:
        return ""
    if tensor.shape[-1] + 1 == hidden.shape[-2]:
        return "; position t predicts token t + 1, so that hidden[:, :-1] goes with tokens[:, 1:]"
    if tensor.shape[-1] == hidden.shape[-2] + 1:
        return f"; position t predicts token t + 1: pass {name}[:, 1:]"
    return ""


def warn_without_gradient(inputs: Inputs) -> None:
    """As torch.utils.checkpoint does, where a backward pass could only fail; its own error does not say which tensors."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not any(tensor is not None and tensor.requires_grad for tensor in inputs[:3]):
        warnings.warn(
            "neither hidden, weight nor bias requires a gradient, so that the loss has none and backward will fail: was "
            "hidden detached, or the model frozen? Call the loss under torch.no_grad() if no gradient is wanted",
            stacklevel=_levels_to_the_caller(),
        )


def _levels_to_the_caller() -> int:
    """How far up the first frame outside fastkl is, seen from the function that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastkl."):
        level, frame = level + 1, frame.f_back
    return level
