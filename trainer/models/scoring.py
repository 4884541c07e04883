"""Scoring: the log-probs that a model gives to tokens it did not choose, and their ranks. No logits beyond a chunk's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastkl.loss import (
    TopK,
    linear_list_logprobs,
    linear_logprobs,
    linear_ranks,
    linear_token_stats,
    linear_top_k,
)
from fastkl.trainer.data.batching import PAD_ID, Batch
from fastkl.trainer.data.samples import UNKNOWN
from fastkl.trainer.errors import RunError
from fastkl.trainer.models.modes import modes_kept

T = TypeVar("T")


def scatter_values(model: nn.Module, batches: Iterable[Batch], field: str, values: Callable[[Batch], Tensor]) -> None:
    """Writes a value [n] of each counted token into the samples' list `field`, batch by batch."""
    with scoring(model):
        for batch in batches:
            batch.scatter(values(batch), field)


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients, then as it was."""
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


def check_finite(logprobs: Tensor, who: str) -> Tensor:
    """The log-probs [n] that the model called `who` gave.

    Raises:
        RunError: Where one of them is not finite.
    """
    wrong = int((~logprobs.isfinite()).sum())
    if wrong:
        raise RunError(
            f"the {who} gives {wrong} of {len(logprobs)} tokens a log-prob that is not finite. Use a {who} that is whole, "
            f"in a dtype of more range (bfloat16 or float32 instead of float16)"
        )
    return logprobs


def batch_logprobs(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    """Log-probs [n] of the counted tokens of a batch; UNKNOWN for ids beyond the model's head (another's padding).

    Such an id has no embedding either: what comes after it is scored as if it were PAD_ID.
    """

    def logprobs(rows: Tensor, weight: Tensor, **head: Any) -> Tensor:
        return token_logprobs(rows, weight, batch.tokens, temperature, head)

    return call_with_rows(model, batch, logprobs, readable(model, batch))


def batch_stats(model: nn.Module, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [n] of the counted tokens of a batch, and the entropies [n] of the distributions they are from.

    All of them are ids of the model's head.
    """

    def stats(rows: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        found = linear_token_stats(rows, weight, batch.tokens, temperature=temperature, **head)
        return found.logprobs, found.entropies

    return call_with_rows(model, batch, stats)


def batch_top_k(
    model: nn.Module, batch: Batch, temperature: float, k: int, vocab_size: int | None
) -> tuple[Tensor, TopK]:
    """`batch_logprobs` and the k likeliest tokens [n, k] among the ids below `vocab_size`, in one forward."""

    def both(rows: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, TopK]:
        likeliest = linear_top_k(rows, weight, k, vocab_size=vocab_size, temperature=temperature, **head)
        return token_logprobs(rows, weight, batch.tokens, temperature, head), likeliest

    return call_with_rows(model, batch, both, readable(model, batch))


def batch_likeliest(model: nn.Module, batch: Batch, k: int, vocab_size: int | None) -> Tensor:
    """The k likeliest ids [n, k] at each counted token of a batch, among those below `vocab_size`."""

    def likeliest(rows: Tensor, weight: Tensor, **head: Any) -> Tensor:
        return linear_top_k(rows, weight, k, vocab_size=vocab_size, **head).ids

    return call_with_rows(model, batch, likeliest, readable(model, batch))


def batch_lists(
    model: nn.Module, batch: Batch, temperature: float, k: int | None, vocab_size: int | None, listed: Tensor | None
) -> tuple[Tensor, list[TopK]]:
    """Log-probs [n] of the counted tokens, and up to two lists with theirs, in one forward; of the ids below `vocab_size`.

    The lists are the model's `k` likeliest tokens and the ids `listed` [n, m], where there are any of them. All log-probs
    are normalised over the ids below `vocab_size`. The tokens' are UNKNOWN from there on.
    """

    def lists(rows: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, list[TopK]]:
        options = {"vocab_size": vocab_size, "temperature": temperature, **head}
        known = batch.tokens < (len(weight) if vocab_size is None else vocab_size)
        ids = batch.tokens.where(known, -1)[:, None]
        ids = ids if listed is None else torch.cat([ids, listed], 1)
        logprobs = linear_list_logprobs(rows, weight, ids, **options)
        found = [] if k is None else [linear_top_k(rows, weight, k, **options)]
        found += [] if listed is None else [TopK(listed, logprobs[:, 1:])]
        return logprobs[:, 0].where(known, UNKNOWN), found

    return call_with_rows(model, batch, lists, readable(model, batch))


def batch_ranks(model: nn.Module, batch: Batch, vocab_size: int) -> Tensor:
    """Ranks [n] int64 of the counted tokens of a batch among the ids below `vocab_size`; 0 for ids from there on."""

    def ranks(rows: Tensor, weight: Tensor, *, bias: Tensor | None, **_: Any) -> Tensor:
        known = min(vocab_size, len(weight))  # a head may lack special tokens
        tokens = batch.tokens.where(batch.tokens < known, -1)
        return linear_ranks(rows, weight, tokens, vocab_size=known, bias=bias, ignore_index=-1)

    return call_with_rows(model, batch, ranks, readable(model, batch))


def call_with_rows(
    model: Callable[..., T], batch: Batch, function: Callable[..., T], inputs: dict[str, Tensor] | None = None
) -> T:
    """What `function(rows [n, D], weight [V, D], **head)` says, with the hidden states that predict the counted tokens.

    Args:
        model: A fused one, or what DDP or FSDP made of it.
        inputs: The model's, if not the batch's own.
    """

    def on_rows(hidden: Tensor, weight: Tensor, **head: Any) -> T:
        return function(hidden.flatten(0, 1)[batch.rows], weight, **head)

    return model(fused=on_rows, **(batch.inputs if inputs is None else inputs))


def readable(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A batch's inputs, with PAD_ID instead of ids that the model has no embedding for."""
    plain: Any = getattr(model, "module", model)  # under DDP
    ids = batch.inputs["input_ids"]
    return {**batch.inputs, "input_ids": ids.where(ids < plain.config.get_text_config().vocab_size, PAD_ID)}


def token_logprobs(rows: Tensor, weight: Tensor, tokens: Tensor, temperature: float, head: dict[str, Any]) -> Tensor:
    known = tokens < weight.shape[0]
    return linear_logprobs(rows, weight, tokens.where(known, 0), temperature=temperature, **head).where(known, UNKNOWN)
