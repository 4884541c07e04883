"""Scoring: the log-probs that a model gives to tokens it did not choose. One forward pass, no logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkl.head import FusedCausalLM
from fastkl.loss import linear_logprobs
from fastkl.trainer.data.batching import PAD_ID, Batch, Layout, batches
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.teacher import UNKNOWN


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
        known = batch.tokens < weight.shape[0]
        tokens = batch.tokens.where(known, 0)
        values = linear_logprobs(hidden.flatten(0, 1)[batch.rows], weight, tokens, temperature=temperature, **head)
        return values.where(known, UNKNOWN)

    fused: Any = getattr(model, "module", model)  # under DDP
    ids = batch.inputs["input_ids"]
    readable = ids.where(ids < fused.model.config.get_text_config().vocab_size, PAD_ID)
    values: Tensor = model(logprobs, **{**batch.inputs, "input_ids": readable})
    return values
