"""What the Triton kernels are compiled for: every way in which a launch may differ and need a kernel of its own.

A family of kernels adds its variants to `VARIANTS`; `bench kernels` and the tests take them from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from bench.divergence_variants import divergence_variants
from bench.score_variants import score_variants
from fastkl.kernels import rows_triton
from fastkl.kernels.rows import Logits


class Variant(Protocol):
    @property
    def kernel(self) -> str:
        """The launcher, as file.function without `_triton`."""

    @property
    def config(self) -> str:
        """What is special about this variant."""

    @property
    def representative(self) -> bool:
        """Is it compiled on every test run?"""

    def launch(self) -> None:
        """Calls the launcher, on a CPU."""


class RowVariant(NamedTuple):
    """A row function on chunks of one kind."""

    name: str
    dtype: torch.dtype
    gradient: torch.dtype | None
    capped: bool
    capped_teacher: bool
    tokens: bool
    vocabulary: (
        int  # 151936 is a multiple of 16 and has vectorised loads, 50257 is odd; 1 is a case of its own to Triton
    )

    @property
    def kernel(self) -> str:
        return f"rows.{self.name}"

    @property
    def config(self) -> str:
        flags = [flag for flag in ("capped", "capped_teacher", "tokens") if getattr(self, flag)]
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.gradient)]
        return "-".join([*dtypes, *flags, str(self.vocabulary)])

    @property
    def representative(self) -> bool:
        """Per kernel: one that is common, two that are heavy, and one that is neither."""
        teacher = self.name == "reverse_kl"
        if self.gradient == torch.bfloat16 and self.tokens and self.capped_teacher == (self.capped and teacher):
            common = self.vocabulary == 151936 and self.dtype == torch.float32
            return self.capped if self.vocabulary == 50257 else common
        return self == RowVariant(self.name, torch.bfloat16, None, False, teacher, not teacher, 50257)

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """On `n` rows, with results and tokens `offset` entries into their buffers."""
        chunk = torch.zeros(n, self.vocabulary, dtype=self.dtype)
        cap, cap_t = (0.5 + n if capped else None for capped in (self.capped, self.capped_teacher))
        two = self.name == "reverse_kl"
        tokens = torch.zeros(n + offset, dtype=torch.int64)[offset:] if self.tokens else None
        out = torch.zeros(2, n + offset)[:, offset:]
        logits = Logits(chunk, cap, chunk if two else None, cap_t if two else None)
        into = self.gradient and (chunk if self.gradient == self.dtype else chunk.to(self.gradient))
        getattr(rows_triton, self.name)(logits, tokens, out, into)


def row_variants() -> Iterator[RowVariant]:
    both = (False, True)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    dtypes = [(fp32, None), (bf16, None), (fp32, fp32), (bf16, bf16), (fp32, bf16), (fp32, fp16)]
    for (dtype, gradient), capped, vocabulary in itertools.product(dtypes, both, (151936, 50257, 1)):
        yield RowVariant("token_nll", dtype, gradient, capped, False, True, vocabulary)
        for capped_teacher, tokens in itertools.product(both, both):
            yield RowVariant("reverse_kl", dtype, gradient, capped, capped_teacher, tokens, vocabulary)


VARIANTS: list[Variant] = [*row_variants(), *divergence_variants(), *score_variants()]
