"""A few short texts that a model is asked about in several ways, and how far two answers are apart.

The plain answer is that of the model's own forward pass, on one text alone: everything else must agree with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkl.head import first_not_finite
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.scoring import scoring

SHORT, LONG = 5, 37  # tokens: the long one takes more than a page of continuous batching, which has 32
NEW = 3  # tokens that a sampler adds
# How far apart two answers may be by rounding, in units of the spread of the model's log-probs over its vocabulary.
FINE, COARSE = 2e-3, 0.1
LEAST_SPREAD = 1e-2  # nats: below it, a difference counts as if the spread were this


class Probe:
    """The texts, and the plain answers to them.

    Args:
        model: A causal LM that has its weights, on its device.
        name: What messages call it.

    Raises:
        ConfigError: Where the answers are not finite.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.texts = probe_texts(model)
        self.logits = [self.plain_logits(ids) for ids in self.texts]  # each [T, V]

    def plain_logits(self, ids: list[int]) -> Tensor:
        """[T, V] float32, of one text alone, in eval mode."""
        with scoring(self.model):
            logits = self.forward(ids)
        if logits.isnan().any() or logits.isposinf().any() or logits.isneginf().all(-1).any():  # −inf forbids an id
            found = first_not_finite(self.model)
            cause = f"its weight {found} is not finite" if found else f"its weights are, as {self.model.dtype}"
            raise ConfigError(f"the {self.name}'s logits of a short text are not finite: {cause}. Give another model")
        return logits

    def forward(self, ids: list[int]) -> Tensor:
        """[T, V] float32, by one forward pass in the mode in which the model is."""
        read = torch.tensor([ids], device=self.model.device)
        inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        with torch.no_grad():
            logits: Tensor = self.model(**inputs, use_cache=False).logits[0]
        return logits.float()

    @property
    def limit(self) -> float:
        """The distance up to which rounding alone may be the cause."""
        exact = self.model.dtype in (torch.float32, torch.float64) and torch.get_float32_matmul_precision() == "highest"
        return FINE if exact and not getattr(self.model, "is_quantized", False) else COARSE


def probe_texts(model: Any) -> list[list[int]]:
    """A long list of token ids and two short ones, within the model's context, without ids that mean something to it."""
    config = model.config.get_text_config()
    size = min(config.vocab_size, model.get_output_embeddings().weight.shape[0])
    special = _special_ids(model.config) | _special_ids(config)
    usual = [token for token in range(min(size, 50_000)) if token not in special] or [0]
    room = (context_length(model) or LONG + NEW) - NEW
    draw = random.Random(0)
    return [[draw.choice(usual) for _ in range(max(1, min(length, room)))] for length in (LONG, SHORT, SHORT)]


def token_logprobs(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """[n] of tokens by the logits [n, V] that predict them."""
    chosen = torch.tensor(tokens, dtype=torch.long, device=logits.device)
    return logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]


def distance(logprobs: Tensor, logits: Tensor, tokens: Sequence[int]) -> float:
    """The mean of |Δ log-prob| [n] of some tokens from those of `logits` [n, V], in units of their spread; 0 of none."""
    if not len(tokens):
        return 0.0
    middle = logits.median(-1, keepdim=True).values
    spread = (logits - middle).abs().median(-1).values.clamp(min=LEAST_SPREAD)
    error = (logprobs.to(logits) - token_logprobs(logits, tokens)).abs() / spread
    return float(error.mean().nan_to_num(nan=torch.inf))


def failure(error: Exception) -> str:
    """An exception of somebody else's code in a few words."""
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0][:120]}"


def _special_ids(config: Any) -> set[int]:
    named = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    return {0} | {token for value in named for token in (value if isinstance(value, list) else [value]) if token}
