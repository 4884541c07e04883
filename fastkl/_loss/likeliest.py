"""The likeliest tokens by hidden states and a head, log-probs of lists, ranks; chunk by chunk of rows (`fastkl.loss`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.heads.operands import operands
from fastkl._loss.options import LikeliestOptions, record, takes
from fastkl.kernels.chunking import row_chunks
from fastkl.kernels.gemm import compute_dtype, most_rows, new_scores, project
from fastkl.kernels.problem import HeadOptions, Inputs, Spec
from fastkl.kernels.rows.pytorch import apply_cap


class TopK(NamedTuple):
    """What `top_k_kl_loss` takes of a teacher."""

    ids: Tensor  # [..., k] int64
    logprobs: Tensor  # [..., k] float32 (float64 for float64), descending, normalised over the whole vocabulary


@takes(LikeliestOptions)
@torch.no_grad()
def linear_top_k(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    k: int,
    **options: Unpack[LikeliestOptions],
) -> TopK:
    """The k likeliest tokens and their log-probs: `torch.log_softmax(z, -1).topk(k)`. No gradient.

    Ids from `vocab_size` on, a head's padding, are left out as if they did not exist. Other arguments: `fastkl.loss`.

    Raises ValueError where k is not between 1 and the vocabulary; TypeError or ValueError for what does not fit.
    """
    head, chunk_size = record(HeadOptions, options), options["chunk_size"]
    inputs = _inputs(hidden, weight, options["bias"], options["vocab_size"], chunk_size)
    check.check_number("k", k, whole=True)
    if isinstance(k, bool) or not 1 <= k <= inputs.weight.shape[0]:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary, {inputs.weight.shape[0]}")
    n, dtype = inputs.hidden.shape[0], compute_dtype(inputs.hidden.dtype)
    top = TopK(hidden.new_empty(n, k, dtype=torch.int64), hidden.new_empty(n, k, dtype=dtype))
    for rows, z in _logits(inputs, head, chunk_size):
        values, top.ids[rows] = z.topk(k, -1)
        top.logprobs[rows] = values - torch.logsumexp(z, -1, keepdim=True)
    return TopK(*(tensor.reshape(*hidden.shape[:-1], k) for tensor in top))


@takes(LikeliestOptions)
@torch.no_grad()
def linear_list_logprobs(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    ids: Tensor,  # [..., k] int64
    **options: Unpack[LikeliestOptions],
) -> Tensor:
    """Log-probs [..., k] of the k ids listed at each place; 0 at ids of −1, which pad. float32 (float64 for float64).

    `torch.log_softmax(z, -1).gather(-1, ids)`. No gradient. It makes a `TopK` of one model's distribution on another's
    likeliest tokens: `TopK(ids, linear_list_logprobs(hidden, weight, ids))`.

    Ids from `vocab_size` on are left out as if they did not exist, and must not be listed. Other arguments: `fastkl.loss`.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    head, chunk_size = record(HeadOptions, options), options["chunk_size"]
    inputs = _inputs(hidden, weight, options["bias"], options["vocab_size"], chunk_size)
    listed = _listed_ids(ids, hidden, inputs.weight.shape[0])
    logprobs = torch.empty(listed.shape, dtype=compute_dtype(inputs.hidden.dtype), device=hidden.device)
    for rows, z in _logits(inputs, head, chunk_size):
        own = z.gather(-1, listed[rows].clamp(min=0)) - torch.logsumexp(z, -1, keepdim=True)
        logprobs[rows] = own.where(listed[rows] >= 0, 0.0)
    return logprobs.reshape(ids.shape)


def _listed_ids(ids: Tensor, hidden: Tensor, vocabulary: int) -> Tensor:
    """Checked, [N, k] int64."""
    check.check_integers("ids", check.check_list("ids", ids, hidden))
    ids = ids.to(torch.int64)
    check.check_listed_ids("ids", ids, vocabulary)
    return ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])


@torch.no_grad()
def linear_ranks(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    *,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Tensor:
    """The rank of each of `tokens`, int64, of their shape: 1 + how many ids have a greater logit; 0 at ignored ones.

    1 is the likeliest token, and ids of one logit have one rank. Temperature, scale and soft-cap change no rank and are no
    arguments. Ids from `vocab_size` on, a head's padding, are left out as if they did not exist.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    inputs = _inputs(hidden, weight, bias, vocab_size, chunk_size)
    check.check_number("ignore_index", ignore_index, whole=True)
    ids = check.check_tokens(tokens, hidden, inputs.weight.shape[0], ignore_index).reshape(-1)
    known = ids != ignore_index
    ids, ranks = ids.where(known, 0), torch.empty_like(ids)
    for rows, z in _logits(inputs, HeadOptions(), chunk_size):
        ranks[rows] = (z > z.gather(-1, ids[rows, None])).sum(-1) + 1
    return ranks.where(known, 0).reshape(tokens.shape)


def _inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None, chunk_size: int | None
) -> Inputs:
    """Checked, with flat rows, without padding ids."""
    check.check_head(hidden, weight, bias)
    check.check_plan("auto", chunk_size, weight, None)
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, {"weight": weight.shape[0]})
    hidden, weight, bias = operands(hidden, weight, bias, vocab_size)
    return Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def _logits(inputs: Inputs, options: HeadOptions, chunk_size: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits [n, V] in the compute dtype: one workspace, which the next chunk overwrites."""
    hidden, weight, bias = inputs[:3]
    chunks = row_chunks(Spec("token_nll", options, None, "torch", chunk_size), inputs, gradient=False)
    workspace = new_scores(hidden, most_rows(chunks), weight.shape[0], compute_dtype(hidden.dtype))
    for rows in chunks:
        z = workspace[: rows.stop - rows.start]
        with torch.autocast(hidden.device.type, enabled=False):
            project(hidden[rows], weight, bias, options.alpha, z)
        apply_cap(z, options.cap, keep=False)
        yield rows, z
