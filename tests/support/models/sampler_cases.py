"""Models, prompts and true log-probs for the samplers' tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tiny_models import causal_lm
from torch import Tensor
from transformers import PreTrainedModel

from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "granite", "mistral"]
ENGINES = {"continuous_batching": ContinuousBatchingSampler, "generate": GenerateSampler}


def make_model(kind: str = "llama", attention: str = "sdpa", **settings: object) -> PreTrainedModel:
    if kind == "gemma2":  # its soft cap is not applied by paged attention; 5.23 has only eager for it
        settings, attention = {"attn_logit_softcapping": None, **settings}, "eager"
    return causal_lm(kind, attention, **settings)


def make_prompts(count: int, low: int = 3, high: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(rng.randint(low, high))] for _ in range(count)]


def scores(model: PreTrainedModel, prompt: list[int], tokens: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probabilities of all tokens at each completion position, from one ordinary forward pass."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    model.train(training)
    return torch.log_softmax(logits / temperature, -1)


def check(
    model: PreTrainedModel, prompts: list[list[int]], completions: Sequence[Completion], temperature: float
) -> None:
    """The completions' log-probs are the model's."""
    for prompt, done in zip(prompts, completions, strict=True):
        expected = scores(model, prompt, done.token_ids, temperature)
        expected = expected.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)
