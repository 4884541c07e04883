"""What the kernels of the sparse backward (`kernels/sparse/steps.py`) are compiled for; see `variants.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastkl.kernels.sparse import steps
from fastkl.kernels.sparse.steps import Selection

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
PRODUCTS = ("sparse.hidden_gradient", "sparse.weight_gradient")


class SparseVariant(NamedTuple):
    """A step of a block."""

    kernel: str  # the first of those that the step launches
    dtype: torch.dtype = BF16
    vocabulary: int = 151936  # a multiple of 16, with vectorised loads; 50257 is odd
    dim: int = 512  # of products; 513 is odd
    capped: bool = False

    @property
    def config(self) -> str:
        size = [str(self.dim)] if self.multiplies else ["capped"] * self.capped
        return "-".join([str(self.dtype).removeprefix("torch."), *size, str(self.vocabulary)])

    @property
    def representative(self) -> bool:
        return self in REPRESENTATIVE

    @property
    def multiplies(self) -> bool:
        return self.kernel in PRODUCTS

    @property
    def programs(self) -> int:
        return 1 if self.multiplies else 2

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """On `n` rows, with what there is per row `offset` entries into its buffers; `n` is also seed and block."""
        u = torch.empty(n, self.vocabulary, dtype=self.dtype)
        per_row, w, tau = torch.empty(n + offset)[offset:], torch.empty(self.vocabulary), torch.empty(1)
        ids, count = torch.empty(self.vocabulary, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
        columns = Selection(ids, w, count, tau)
        match self.kernel:
            case "sparse.column_squares":
                steps.column_squares(u, per_row)
            case "sparse.count_columns":
                steps.select_columns(w, tau, n << 31, n)
            case "sparse.compact":
                steps.compact(u, columns, self.capped)
            case "sparse.hidden_gradient":
                weight, centre = torch.empty(self.vocabulary, self.dim, dtype=self.dtype), torch.empty(self.dim)
                steps.hidden_gradient(u, weight, columns, per_row, per_row, centre)
            case "sparse.weight_gradient":
                accumulator, hidden = torch.empty(self.vocabulary, self.dim), torch.empty(n, self.dim, dtype=self.dtype)
                steps.add_to_weight_gradient(accumulator, u, hidden, columns)


# Each step as it is most often, and what is heaviest.
REPRESENTATIVE = (
    SparseVariant("sparse.column_squares"),
    SparseVariant("sparse.count_columns"),
    SparseVariant("sparse.compact", capped=True),
    SparseVariant("sparse.hidden_gradient"),
    SparseVariant("sparse.hidden_gradient", FP16, 50257, 513),
    SparseVariant("sparse.weight_gradient"),
    SparseVariant("sparse.weight_gradient", FP16, 50257, 513),
)


def sparse_variants() -> Iterator[SparseVariant]:
    """Without a vocabulary of one word, for which the compiler spills registers in two steps: nobody has one."""
    dtypes, vocabularies = (FP32, BF16, FP16), (151936, 50257)  # rows aligned to 16 bytes, and not
    for vocabulary in vocabularies:
        yield SparseVariant("sparse.count_columns", vocabulary=vocabulary)
    for dtype, vocabulary in itertools.product(dtypes, vocabularies):
        yield SparseVariant("sparse.column_squares", dtype, vocabulary)
        for capped in (False, True):
            yield SparseVariant("sparse.compact", dtype, vocabulary, capped=capped)
        for kernel, dim in itertools.product(PRODUCTS, (512, 513)):
            yield SparseVariant(kernel, dtype, vocabulary, dim)
