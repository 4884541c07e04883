"""Scoring: the log-probs that a model gives to tokens it did not choose, and their ranks. No logits beyond a chunk's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.head import FusedCausalLM
from fastkl.loss import TopK, linear_logprobs, linear_ranks, linear_top_k
from fastkl.trainer.data.batching import PAD_ID, Batch, Layout, batches
from fastkl.trainer.data.samples import UNKNOWN, Sample


@torch.no_grad()
def score(
    model: FusedCausalLM,
    samples: Sequence[Sample],
    field: str,
    *,
    temperature: float,
    max_tokens: int,
    layout: Layout,
    device: torch.device,
) -> None:
    """Writes the model's log-probs at `temperature` of every counted token into the samples' list `field`."""
    training = model.training
    model.eval()
    for batch in batches(samples, max_tokens, layout, device):
        batch.scatter(batch_logprobs(model, batch, temperature), field)
    model.train(training)


def batch_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probs [n] of the counted tokens of a batch; UNKNOWN for ids beyond the model's head (another's padding).

    Such an id has no embedding either: what comes after it is scored as if it were PAD_ID.
    """

    def logprobs(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        return _token_logprobs(hidden.flatten(0, 1)[batch.rows], weight, batch.tokens, temperature, head)

    values: Tensor = model(logprobs, **readable(model, batch))
    return values


def batch_top_k(
    model: FusedCausalLM, batch: Batch, temperature: float, k: int, vocab_size: int | None
) -> tuple[Tensor, TopK]:
    """`batch_logprobs` and the k likeliest tokens [n, k] among the ids below `vocab_size`, in one forward."""

    def both(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, TopK]:
        rows = hidden.flatten(0, 1)[batch.rows]
        likeliest = linear_top_k(rows, weight, k, vocab_size=vocab_size, temperature=temperature, **head)
        return _token_logprobs(rows, weight, batch.tokens, temperature, head), likeliest

    found: tuple[Tensor, TopK] = model(both, **readable(model, batch))
    return found


def batch_ranks(model: nn.Module, batch: Batch, vocab_size: int) -> Tensor:
    """Ranks [n] int64 of the counted tokens of a batch among the ids below `vocab_size`; 0 for ids from there on."""
    tokens = batch.tokens.where(batch.tokens < vocab_size, -1)

    def ranks(hidden: Tensor, weight: Tensor, *, bias: Tensor | None, **_: Any) -> Tensor:
        rows = hidden.flatten(0, 1)[batch.rows]
        return linear_ranks(rows, weight, tokens, vocab_size=vocab_size, bias=bias, ignore_index=-1)

    found: Tensor = model(ranks, **readable(model, batch))
    return found


def _token_logprobs(rows: Tensor, weight: Tensor, tokens: Tensor, temperature: float, head: dict[str, Any]) -> Tensor:
    known = tokens < weight.shape[0]
    return linear_logprobs(rows, weight, tokens.where(known, 0), temperature=temperature, **head).where(known, UNKNOWN)


def readable(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch's inputs without ids that the model has no embedding for: PAD_ID in their place."""
    fused: Any = getattr(model, "module", model)  # under DDP
    config = fused.model.config
    ids = batch.inputs["input_ids"]
    return {**batch.inputs, "input_ids": ids.where(ids < config.get_text_config().vocab_size, PAD_ID)}
