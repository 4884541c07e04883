"""What the samplers of this process share: the model under an adapter, arguments that can be sampled from, its state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.trainer.errors import RunError
from fastkl.trainer.models.modes import modes_kept
from fastkl.trainer.models.sizes.layers import most_positions


def unwrapped(model: Any) -> Any:
    """The Transformers model itself; what a PEFT model has put into it stays in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_requests(config: Any, prompts: list[list[int]], max_new_tokens: int, temperature: float) -> None:
    """Refuses what a model with this config cannot complete.

    Raises:
        ValueError: Naming the argument, or the prompt by its place.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be finite and not negative")
    limit = most_positions(config)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {index} has a token id outside 0..{config.vocab_size - 1}")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens: with {max_new_tokens} new ones it exceeds "
                f"the model's {limit} positions"
            )


def check_distribution(logprobs: Tensor, token: int) -> None:
    """Refuses to draw from log-probs [B, V] that are no distribution, for the completions' token number `token`, from 0.

    Raises:
        RunError: Naming the token.
    """
    if logprobs.amax(-1).isnan().any():
        raise RunError(
            f"the model's logits for token {token + 1} of a completion are not finite: there is nothing to sample from. "
            f"Begin from weights that are whole, lower optim.lr, or use a dtype of more range (bfloat16 instead of float16)"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves each module in training or not as it was, and the global random generators where they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with modes_kept(model), torch.random.fork_rng(devices=devices):
        yield
