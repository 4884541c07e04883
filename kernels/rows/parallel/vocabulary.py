"""What a row function does over the vocabulary: its chunk has all ids, or the processes of a group have a part each.

A row function in PyTorch is written once, on a `Vocabulary`. With `Whole` a chunk has every id. With `Pieces` it has those
of this process, and what is one number for a row comes from the group: the largest score, sums over the ids, the score of a
named id. The numbers of all processes are gathered and merged in the order of their ranks: all have the same bits then.
One in Triton has a kernel for the numbers of a chunk and one for its gradient; between them `merge_scores` exchanges.

With m_r the largest score of process r and l_r = Σ exp(z − m_r) over its ids,

    m = max m_r        l = Σ_r exp(m_r − m) l_r        lse = m + log l

and with H_r the entropy of the softmax over its ids alone, so that log l_r − H_r is the mean of z − m_r there,

    H = log l − Σ_r (exp(m_r − m) l_r / l) (log l_r − H_r + m_r − m)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastkl.kernels.rows.parallel.share import Share, gathered

# Smaller blocks that fit a cache are no faster (a row is most of one already), and every pass over a block is a barrier
# between threads, which costs dearly on a busy machine.
BLOCK_BYTES = 32 * 2**20


class Softmax(NamedTuple):
    """Of each row [n]. lse(z) is peak − top. −log p[y] is (peak − target) − top: large logits cancel first."""

    peak: Tensor  # max z
    top: Tensor  # log max p
    target: Tensor  # z[y]


class Vocabulary(Protocol):
    """Ids are those of all processes. Chunks [n, V] have the V ids of this one."""

    def size(self, chunk: Tensor) -> int:
        """The number of all ids."""

    def own(self, tensor: Tensor, chunk: Tensor) -> Tensor:
        """Of a tensor with an entry for each id, the entries for those of a chunk."""

    def blocks(self, chunk: Tensor) -> Iterator[slice]:
        """The rows to work on at a time."""

    def softmax(self, z: Tensor, y: Tensor) -> Softmax:
        """z becomes softmax(z); y [n, 1]."""

    def log_softmax(self, z: Tensor, y: Tensor) -> Softmax:
        """z becomes log softmax(z); y [n, 1]."""

    def log_softmaxes(self, *chunks: Tensor) -> None:
        """Each z becomes log softmax(z)."""

    def part(self, x: Tensor, ids: Tensor) -> Tensor:
        """x at ids [n, k], 0 where another process has the id: `total` makes it whole."""

    def put(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        """x[ids] = values [n, k]. An id that is there twice has one value."""

    def subtract(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        """x[ids] −= values [n, 1]."""

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all ids from those over each process's, of any shape."""

    def first_largest(self, *chunks: Tensor) -> list[Tensor]:
        """The first id of the largest entry, [n] for each, of any dtype."""

    def largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries [n, k], in descending order, and their ids."""

    def tail(self, sums: Tensor, power: float) -> Tensor:
        """`top_k/formula.TailFunctions.tail_sums` over all ids, from those of this process."""

    def places(self, chunk: Tensor, tokens: Tensor) -> Tensor:
        """Where tokens [n] are in a chunk; −1 for those of another process, and those of none."""

    def merge_scores(self, chunk: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Values [5, n] of `token_nll_entropy` over the ids of a chunk become those over all ids.

        out[2] and out[3] are 0 and −∞ where no id of this process can be emitted. What is in out[0] and out[4] of a token
        that it does not have is of no use. A token of no process makes its row NaN.
        """


class Whole:
    """A chunk has all ids."""

    def size(self, chunk: Tensor) -> int:
        return chunk.shape[1]

    def own(self, tensor: Tensor, chunk: Tensor) -> Tensor:
        return tensor

    def blocks(self, chunk: Tensor) -> Iterator[slice]:
        return row_blocks(chunk)

    def softmax(self, z: Tensor, y: Tensor) -> Softmax:
        target, peak = z.gather(1, y).squeeze(1), z.amax(-1)
        torch.softmax(z, -1, out=z)
        return Softmax(peak, z.amax(-1).log_(), target)

    def log_softmax(self, z: Tensor, y: Tensor) -> Softmax:
        target, peak = z.gather(1, y).squeeze(1), z.amax(-1)
        torch.log_softmax(z, -1, out=z)
        return Softmax(peak, z.amax(-1), target)

    def log_softmaxes(self, *chunks: Tensor) -> None:
        for z in chunks:
            torch.log_softmax(z, -1, out=z)

    def part(self, x: Tensor, ids: Tensor) -> Tensor:
        return x.gather(1, ids)

    def put(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        x.scatter_(1, ids, values)

    def subtract(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        x.scatter_add_(1, ids, -values)

    def total(self, sums: Tensor) -> Tensor:
        return sums

    def first_largest(self, *chunks: Tensor) -> list[Tensor]:
        return [x.argmax(-1) for x in chunks]

    def largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, ids = x.topk(k, -1)
        return values, ids

    def tail(self, sums: Tensor, power: float) -> Tensor:
        return sums

    def places(self, chunk: Tensor, tokens: Tensor) -> Tensor:
        return tokens

    def merge_scores(self, chunk: Tensor, tokens: Tensor, out: Tensor) -> None:
        return


WHOLE = Whole()


class Pieces:
    """A chunk has the ids of one process of a group.

    Each softmax, `total`, `first_largest`, `largest`, `tail` and `merge_scores` is a collective: all processes come to it.
    """

    def __init__(self, share: Share) -> None:
        self.share = share

    def size(self, chunk: Tensor) -> int:
        return self.share.vocabulary

    def own(self, tensor: Tensor, chunk: Tensor) -> Tensor:
        return tensor[self.share.first : self.share.first + chunk.shape[1]]

    def blocks(self, chunk: Tensor) -> Iterator[slice]:
        """All of them, on a CPU too: a block is a collective, and has as many rows on every process."""
        yield slice(0, chunk.shape[0])

    def softmax(self, z: Tensor, y: Tensor) -> Softmax:
        target, m = self._scores(z, y), peak_of(z)
        z.sub_(_finite(m)[:, None]).exp_()
        parts = gathered(self.share.group, torch.stack([m, z.sum(-1), target]))
        peak, total = _merged(parts)
        z.mul_((torch.exp(m - peak) / total)[:, None])
        return Softmax(peak, -total.log(), _named(parts[:, 2]))

    def log_softmax(self, z: Tensor, y: Tensor) -> Softmax:
        target, m = self._scores(z, y), peak_of(z)
        parts = gathered(self.share.group, torch.stack([m, _centred_sum(z, m), target]))
        peak, total = _merged(parts)
        _normalise(z, m, peak, total)
        return Softmax(peak, -total.log(), _named(parts[:, 2]))

    def log_softmaxes(self, *chunks: Tensor) -> None:
        peaks = [peak_of(z) for z in chunks]
        own = [torch.stack([m, _centred_sum(z, m)]) for z, m in zip(chunks, peaks, strict=True)]
        parts = gathered(self.share.group, torch.stack(own))
        for i, (z, m) in enumerate(zip(chunks, peaks, strict=True)):
            _normalise(z, m, *_merged(parts[:, i]))

    def part(self, x: Tensor, ids: Tensor) -> Tensor:
        places, here = self._places(x, ids)
        return torch.zeros_like(ids, dtype=x.dtype) if x.shape[1] == 0 else x.gather(1, places).where(here, 0.0)

    def put(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        """An id of another process repeats what is put beside it, or what is there: no place gets two values."""
        if x.shape[1] == 0:
            return
        places, here = self._places(x, ids)
        one, some = here.to(torch.uint8).argmax(1, keepdim=True), here.any(1, keepdim=True)
        values = torch.where(here, values, torch.where(some, values.gather(1, one), x[:, :1]))
        x.scatter_(1, torch.where(here, places, places.gather(1, one)), values)

    def subtract(self, x: Tensor, ids: Tensor, values: Tensor) -> None:
        if x.shape[1] > 0:
            places, here = self._places(x, ids)
            x.scatter_add_(1, places, -values.where(here, 0.0))

    def total(self, sums: Tensor) -> Tensor:
        return gathered(self.share.group, sums).sum(0)

    def first_largest(self, *chunks: Tensor) -> list[Tensor]:
        own = [torch.stack([peak_of(x), self._id_of_peak(x)]) for x in chunks]
        peaks, ids = gathered(self.share.group, torch.stack(own)).unbind(2)
        first = ids.where(peaks == peaks.amax(0), torch.inf).amin(0)
        return [*first.unbind(0)]

    def largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Those among the k largest of each process, of which some may have fewer ids than k."""
        few = min(k, x.shape[1])
        values, ids = x.topk(few, -1)
        own = torch.stack([_padded(values, k, -torch.inf), _padded((ids + self.share.first).to(x.dtype), k, -1.0)])
        all_values, all_ids = (parts.movedim(0, 1).flatten(1) for parts in gathered(self.share.group, own).unbind(1))
        # Padding last, so that no entry of −inf has less right to a place.
        order = torch.sort(all_ids < 0, dim=-1, stable=True).indices
        found = torch.sort(all_values.gather(1, order), dim=-1, descending=True, stable=True)
        return found.values[:, :k], all_ids.gather(1, order.gather(1, found.indices[:, :k])).to(torch.int64)

    def tail(self, sums: Tensor, power: float) -> Tensor:
        parts = gathered(self.share.group, sums)
        peak = parts[:, 0].amax(0)
        step = (parts[:, 0] - peak).where(parts[:, 1] != 0, 0.0)  # no entries, no peak
        merged = torch.empty_like(sums)
        merged[0], merged[1] = peak, (parts[:, 1] * step.exp()).sum(0)
        if len(sums) > 2:
            merged[2] = (parts[:, 2] * (power * step).exp()).sum(0)
        return merged

    def places(self, chunk: Tensor, tokens: Tensor) -> Tensor:
        places, here = self._places(chunk, tokens)
        return places.where(here, -1)

    def merge_scores(self, chunk: Tensor, tokens: Tensor, out: Tensor) -> None:
        _, here = self._places(chunk, tokens)
        own = torch.stack([*out[1:4], out[4].where(here, -torch.inf)])
        entropy, m, log_l, gap = gathered(self.share.group, own).unbind(1)
        some = log_l != -torch.inf
        m = m.where(some, -torch.inf)
        peak = m.amax(0).where(some.any(0), 0.0)
        log_mass = m - peak + log_l
        total = torch.logsumexp(log_mass, 0)
        mean = (log_l - entropy + m - peak).where(some & (log_mass - total != -torch.inf), 0.0)
        out[1] = (total - ((log_mass - total).exp() * mean).sum(0)).masked_fill(~some.any(0), torch.nan)
        out[2], out[3] = peak, total
        gap = torch.where(gap == -torch.inf, gap, peak - m + gap).amax(0)
        out[4] = gap.masked_fill(self._is_none(tokens), torch.nan)
        out[0] = out[4] + total

    def _is_none(self, ids: Tensor) -> Tensor:
        """Those that no process has."""
        return (ids < 0) | (ids >= self.share.vocabulary)

    def _places(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of ids, 0 where another process has them, and where this one does."""
        places = ids - self.share.first
        here = (places >= 0) & (places < x.shape[1])
        return places.where(here, 0), here

    def _scores(self, z: Tensor, y: Tensor) -> Tensor:
        """z[y] [n]; −inf where another process has it, NaN where none has."""
        _, here = self._places(z, y)
        return self.part(z, y).where(here, -torch.inf).masked_fill(self._is_none(y), torch.nan).squeeze(1)

    def _id_of_peak(self, x: Tensor) -> Tensor:
        """As a number of the chunk's dtype: float32 has every id below 2²⁴."""
        return x.new_zeros(x.shape[0]) if x.shape[1] == 0 else (x.argmax(-1) + self.share.first).to(x.dtype)


def row_blocks(chunk: Tensor) -> Iterator[slice]:
    """Blocks of about BLOCK_BYTES on a CPU; the whole chunk elsewhere, where launches cost more than cache misses."""
    n, vocabulary = chunk.shape
    step = max(1, BLOCK_BYTES // max(1, vocabulary * chunk.element_size())) if chunk.is_cpu else max(1, n)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _padded(x: Tensor, k: int, value: float) -> Tensor:
    """[n, k] of what has fewer columns."""
    return torch.nn.functional.pad(x, (0, k - x.shape[1]), value=value)


def peak_of(z: Tensor) -> Tensor:
    """max z [n]; −inf for no ids."""
    return z.amax(-1) if z.shape[1] > 0 else z.new_full(z.shape[:1], -torch.inf)


def _finite(m: Tensor) -> Tensor:
    """For a row without an entry but −inf."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def _centred_sum(z: Tensor, m: Tensor) -> Tensor:
    """Σ exp(z − m) [n]; z becomes z − m."""
    return z.sub_(_finite(m)[:, None]).exp().sum(-1)


def _merged(parts: Tensor) -> tuple[Tensor, Tensor]:
    """m and l [n] from m_r and l_r [processes, 2 …, n]."""
    peak = parts[:, 0].amax(0)
    return peak, (parts[:, 1] * torch.exp(parts[:, 0] - peak)).sum(0)


def _normalise(z: Tensor, m: Tensor, peak: Tensor, total: Tensor) -> None:
    """z, less its m_r, becomes log p."""
    z.add_(((_finite(m) - peak) - total.log())[:, None])


def _named(scores: Tensor) -> Tensor:
    """The score [n] of the process that has the token."""
    return scores.amax(0)
