"""What the Triton kernels are compiled for: every way in which a launch may differ and need a kernel of its own.

A family of kernels adds its variants to `VARIANTS`; `bench kernels` and the tests take them from there.
"""

from __future__ import annotations

from typing import Protocol

from bench.variants.divergence import divergence_variants
from bench.variants.rows import row_variants
from bench.variants.score import score_variants
from bench.variants.sparse import sparse_variants


class Variant(Protocol):
    @property
    def kernel(self) -> str:
        """The launcher, as family.function."""

    @property
    def config(self) -> str:
        """What is special about this variant."""

    @property
    def representative(self) -> bool:
        """Is it compiled on every test run?"""

    @property
    def programs(self) -> int:
        """How many must fit a multiprocessor at a time, by their registers."""

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """Calls the launcher for `n` rows, on a CPU, with what there is per row `offset` entries into its buffers."""


VARIANTS: list[Variant] = [*row_variants(), *divergence_variants(), *score_variants(), *sparse_variants()]
