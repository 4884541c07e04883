"""Models whose heads differ, and their log-probs with all the logits and by a fused head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import causal_lm
from torch import Tensor, nn

from fastkl.loss import linear_logprobs

TEMPERATURE = 0.7

# What each family adds between the hidden states and the logits.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"kind": "llama", "tie_word_embeddings": False},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True},
    "smollm3": {"kind": "smollm3", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"kind": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"kind": "qwen3", "tie_word_embeddings": True},
    "gemma2-softcap": {"kind": "gemma2", "attention": "eager", "final_logit_softcapping": 3.0},
    "gemma2-no-softcap": {"kind": "gemma2", "attention": "eager", "final_logit_softcapping": None},
    "gemma3-softcap": {"kind": "gemma3_text", "final_logit_softcapping": 5.0},
    "granite-scale": {"kind": "granite", "logits_scaling": 8.0, "tie_word_embeddings": True},
    "cohere-scale": {"kind": "cohere", "logit_scale": 0.0625},
    "phi-bias": {"kind": "phi", "tie_word_embeddings": False},
}


def build(family: str) -> Any:
    model = causal_lm(**FAMILIES[family])  # type: ignore[arg-type]
    bias = model.get_output_embeddings().bias
    if bias is not None:  # initialised to 0, where leaving it out would go unnoticed
        nn.init.normal_(bias)
    return model.train()


def token_ids() -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def plain_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs [2, 8] as everyone computes them: with all the logits."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = torch.log_softmax(logits.to(dtype) / TEMPERATURE, -1)
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1)


def fused_logprobs(model: nn.Module, ids: Tensor) -> Any:
    def logprobs(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        return linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], temperature=TEMPERATURE, **head)

    return model(input_ids=ids, attention_mask=torch.ones_like(ids), fused=logprobs)


def gradients(model: nn.Module, logprobs: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Values, and the gradient of a weighted sum of them by every parameter that is trained."""
    model.zero_grad(set_to_none=True)
    values = logprobs()
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).reshape(values.shape)
    (values * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return values.detach(), found


def change_logits(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """What the model does to its logits after the head, from here on."""
    plain_forward = model.forward

    def forward(**inputs: Any) -> Any:
        output = plain_forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
