"""The likeliest tokens by hidden states and a head, log-probs of lists, ranks; chunk by chunk of rows (`fastkl.loss`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkl._loss import arguments as check
from fastkl._loss.heads.operands import operands
from fastkl._loss.heads.shares import Piece, is_part
from fastkl._loss.options import LikeliestOptions, RankOptions, record, takes
from fastkl.kernels.chunking import row_chunks
from fastkl.kernels.gemm import compute_dtype, most_rows, new_scores, project
from fastkl.kernels.problem import HeadOptions, Inputs, Spec
from fastkl.kernels.rows.parallel.vocabulary import WHOLE, Pieces, Vocabulary
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
    scores = _scores(hidden, weight, options, record(HeadOptions, options))
    check.check_number("k", k, whole=True)
    if isinstance(k, bool) or not 1 <= k <= scores.ids:
        raise ValueError(f"k is {k}; it must be between 1 and the vocabulary, {scores.ids}")
    n = scores.inputs.hidden.shape[0]
    top = TopK(hidden.new_empty(n, k, dtype=torch.int64), hidden.new_empty(n, k, dtype=scores.dtype))
    for rows, z in scores.chunks():
        values, top.ids[rows] = scores.vocabulary.largest(z, k)
        top.logprobs[rows] = scores.logprobs(z, top.ids[rows], values)
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
    scores = _scores(hidden, weight, options, record(HeadOptions, options))
    listed = _listed_ids(ids, hidden, scores.ids)
    logprobs = torch.empty(listed.shape, dtype=scores.dtype, device=hidden.device)
    for rows, z in scores.chunks() if listed.shape[1] > 0 else ():
        known = listed[rows].clamp(min=0)
        own = scores.logprobs(z, known, scores.vocabulary.total(scores.vocabulary.part(z, known)))
        logprobs[rows] = own.where(listed[rows] >= 0, 0.0)
    return logprobs.reshape(ids.shape)


def _listed_ids(ids: Tensor, hidden: Tensor, vocabulary: int) -> Tensor:
    """Checked, [N, k] int64."""
    check.check_integers("ids", check.check_list("ids", ids, hidden))
    ids = ids.to(torch.int64)
    check.check_listed_ids("ids", ids, vocabulary)
    return ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])


@takes(RankOptions)
@torch.no_grad()
def linear_ranks(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    tokens: Tensor,  # [...] int64
    **options: Unpack[RankOptions],
) -> Tensor:
    """The rank of each of `tokens`, int64, of their shape: 1 + how many ids have a greater logit; 0 at ignored ones.

    1 is the likeliest token, and ids of one logit have one rank. Temperature, scale and soft-cap change no rank and are no
    arguments. Ids from `vocab_size` on, a head's padding, are left out as if they did not exist. Other arguments:
    `fastkl.loss`.

    Raises TypeError or ValueError for shapes, dtypes, devices or ids that do not fit, before anything is computed.
    """
    scores, ignored = _scores(hidden, weight, options, HeadOptions()), options["ignore_index"]
    ids = check.check_tokens(tokens, hidden, scores.ids, ignored).reshape(-1)
    known = ids != ignored
    ids, ranks = ids.where(known, 0), torch.empty_like(ids)
    for rows, z in scores.chunks():
        own = scores.vocabulary.total(scores.vocabulary.part(z, ids[rows, None]))
        ranks[rows] = scores.vocabulary.total((z > own).sum(-1)) + 1
    return ranks.where(known, 0).reshape(tokens.shape)


class _Scores(NamedTuple):
    """The logits of flat rows, a chunk at a time; of this process's ids where several have the vocabulary."""

    inputs: Inputs
    spec: Spec
    ids: int  # of all processes

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.inputs.hidden.dtype)

    @property
    def vocabulary(self) -> Vocabulary:
        return WHOLE if self.spec.share is None else Pieces(self.spec.share)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their logits [n, V] in the compute dtype: one workspace, which the next chunk overwrites."""
        hidden, weight, bias = self.inputs[:3]
        chunks, head = row_chunks(self.spec, self.inputs, gradient=False), self.spec.student
        workspace = new_scores(hidden, most_rows(chunks), weight.shape[0], self.dtype)
        for rows in chunks:
            z = workspace[: rows.stop - rows.start]
            with torch.autocast(hidden.device.type, enabled=False):
                project(hidden[rows], weight, bias, head.alpha, z)
            apply_cap(z, head.cap, keep=False)
            yield rows, z

    def logprobs(self, z: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """log p [n, k] of ids whose logits are `values`; z, a chunk, is spent."""
        peak, top, _ = self.vocabulary.softmax(z, ids[:, :1])
        return (values - peak[:, None]) + top[:, None]


def _scores(hidden: Tensor, weight: Tensor, options: Mapping[str, Any], head: HeadOptions) -> _Scores:
    """Checked, without padding ids."""
    piece: Piece | None = options["group"]
    bias, chunk_size, vocab_size = options["bias"], options["chunk_size"], options["vocab_size"]
    check.check_head(hidden, weight, bias, part=is_part(piece))
    check.check_plan("auto", chunk_size, weight, None)
    all_ids = weight.shape[0] if piece is None else piece.share.vocabulary
    if vocab_size is not None:
        check.check_vocab_size(vocab_size, {"weight": all_ids})
    hidden, weight, bias = operands(hidden, weight, bias, vocab_size, piece)
    spec = Spec("token_nll", head, None, "torch", chunk_size, share=None if piece is None else piece.cut(vocab_size))
    ids = all_ids if vocab_size is None else vocab_size
    return _Scores(Inputs(hidden.reshape(-1, hidden.shape[-1]), weight, bias), spec, ids)
