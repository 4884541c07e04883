"""What the scoring kernels (`kernels/score/triton.py`) are compiled for; see `variants.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score import triton as score_triton
from fastkl.kernels.score.triton import Head


class ScoreVariant(NamedTuple):
    """A scoring function on heads of one kind: a kernel that multiplies and one that merges."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    dim: int = 512  # 512: steps of D come out even; 528: they do not; 520: no vectors, but descriptors; 513: neither
    entropy: bool = False
    capped: bool = False
    capped_teacher: bool = False
    bias: bool = False
    tokens: bool = True
    vocabulary: int = 4096

    @property
    def kernel(self) -> str:
        return f"score.{self.name}"

    @property
    def config(self) -> str:
        flags = [f for f in ("entropy", "capped", "capped_teacher", "bias", "tokens") if getattr(self, f)]
        return "-".join([str(self.dtype).removeprefix("torch."), *flags, str(self.dim), str(self.vocabulary)])

    @property
    def representative(self) -> bool:
        return self in REPRESENTATIVE

    @property
    def programs(self) -> int:
        return 1

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """On `n` rows, with tokens and values `offset` entries into their buffers."""
        tokens = torch.zeros(n + offset, dtype=torch.int64)[offset:]
        out = torch.empty(2, n + offset)[:, offset:]
        if self.name == "token_nll":
            score_triton.token_nll(self._head(n, self.capped), tokens, out, self.entropy)
        else:
            heads = self._head(n, self.capped), self._head(n, self.capped_teacher)
            score_triton.reverse_kl(*heads, tokens if self.tokens else None, out)

    def _head(self, n: int, capped: bool) -> Head:
        hidden, weight = (torch.empty(rows, self.dim, dtype=self.dtype) for rows in (n, self.vocabulary))
        bias = torch.empty(self.vocabulary, dtype=self.dtype) if self.bias else None
        return Head(hidden, weight, bias, HeadOptions(temperature=0.5 + n, softcap=0.5 + n if capped else None))


# A common one of each function, and one of each that lacks what makes that one fast.
REPRESENTATIVE = (
    ScoreVariant("token_nll"),
    ScoreVariant("token_nll", torch.bfloat16, 528, entropy=True, bias=True),
    ScoreVariant("reverse_kl", capped_teacher=True),
    ScoreVariant("reverse_kl", torch.float16, 520, capped=True, bias=True),
)


def score_variants() -> Iterator[ScoreVariant]:
    both = (False, True)
    operands = [*itertools.product([torch.bfloat16], [512, 528, 513]), *itertools.product([torch.float32], [512, 513])]
    operands += [(torch.float16, 520)]
    for (dtype, dim), capped, bias in itertools.product(operands, both, both):
        for entropy in both:
            yield ScoreVariant("token_nll", dtype, dim, entropy, capped, bias=bias)
        for capped_teacher in both:
            yield ScoreVariant("reverse_kl", dtype, dim, False, capped, capped_teacher, bias)
    yield ScoreVariant("reverse_kl", tokens=False, vocabulary=4097)
    yield ScoreVariant("token_nll", vocabulary=4097)
