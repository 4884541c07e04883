"""What the divergence kernels (`kernels/divergence/triton.py`) are compiled for; see `variants.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch

from fastkl.kernels.divergence.formula import ROWS, ROWS_WITH_EXTRAS, Divergence
from fastkl.kernels.divergence.triton import divergence
from fastkl.kernels.rows.interface import Logits


class DivergenceVariant(NamedTuple):
    """A divergence on chunks of one kind."""

    kind: Divergence
    dtype: torch.dtype
    gradient: torch.dtype | None
    capped: bool
    capped_teacher: bool
    tokens: bool
    extras: bool
    vocabulary: int  # see RowVariant

    @property
    def kernel(self) -> str:
        return "divergence.divergence"

    @property
    def config(self) -> str:
        flags = [flag for flag in ("capped", "capped_teacher", "tokens", "extras") if getattr(self, flag)]
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.gradient)]
        return "-".join([self.kind, *dtypes, *flags, str(self.vocabulary)])

    @property
    def representative(self) -> bool:
        return self in REPRESENTATIVE

    @property
    def programs(self) -> int:
        return 1 if self.extras else 2

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """On `n` rows, with results and tokens `offset` entries into their buffers."""
        chunk = torch.zeros(n, self.vocabulary, dtype=self.dtype)
        cap, cap_t = (0.5 + n if capped else None for capped in (self.capped, self.capped_teacher))
        tokens = torch.zeros(n + offset, dtype=torch.int64)[offset:] if self.tokens else None
        out = torch.zeros(ROWS_WITH_EXTRAS if self.extras else ROWS, n + offset)[:, offset:]
        into = None if self.gradient is None else chunk.to(self.gradient)  # the chunk itself if that is its dtype
        divergence(self.kind, 0.125 / n, Logits(chunk, cap, chunk, cap_t), tokens, out, into)


# The one with everything; the one that leaves least room for a second program; two that are common.
REPRESENTATIVE = (
    DivergenceVariant("jsd", torch.float32, torch.bfloat16, True, True, True, True, 50257),
    DivergenceVariant("skewed_forward_kl", torch.float32, torch.bfloat16, True, True, True, False, 50257),
    DivergenceVariant("skewed_reverse_kl", torch.float32, torch.bfloat16, False, False, True, False, 151936),
    DivergenceVariant("forward_kl", torch.bfloat16, torch.bfloat16, False, False, False, False, 151936),
)


def divergence_variants() -> Iterator[DivergenceVariant]:
    both = (False, True)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    dtypes = [(fp32, None), (bf16, None), (fp32, fp32), (bf16, bf16), (fp32, bf16), (fp32, fp16)]
    for kind, (dtype, gradient), vocabulary in itertools.product(get_args(Divergence), dtypes, (151936, 50257, 1)):
        for capped, capped_teacher, tokens, extras in itertools.product(both, both, both, both):
            yield DivergenceVariant(kind, dtype, gradient, capped, capped_teacher, tokens, extras, vocabulary)
