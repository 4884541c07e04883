"""What the row functions of one chunk are compiled for (`kernels/rows/triton.py`, `kernels/top_k/triton.py`); see
`variants.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastkl.kernels.rows import triton as rows_triton
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.top_k import triton as top_k_triton

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
VALUES: list[tuple[torch.dtype, torch.dtype | None]] = [(FP32, None), (BF16, None)]
GRADIENTS: list[tuple[torch.dtype, torch.dtype | None]] = [(FP32, FP32), (BF16, BF16), (FP32, BF16), (FP32, FP16)]
# Of each function: dtypes of chunk and gradient.
FUNCTIONS = {
    "rows.token_nll": VALUES + GRADIENTS,
    "rows.token_nll_entropy": VALUES,
    "rows.entropy_gradient": GRADIENTS,
    "tails.tail_sums": VALUES,
    "tails.tail_gradient": GRADIENTS,
}


class RowVariant(NamedTuple):
    """A row function on chunks of one kind."""

    kernel: str
    dtype: torch.dtype
    gradient: torch.dtype | None
    capped: bool
    vocabulary: int  # 151936: a multiple of 16, with vectorised loads; 50257 is odd; 1 is a case of its own to Triton

    @property
    def config(self) -> str:
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.gradient)]
        return "-".join([*dtypes, *["capped"] * self.capped, str(self.vocabulary)])

    @property
    def representative(self) -> bool:
        return self in REPRESENTATIVE

    @property
    def programs(self) -> int:
        return 2

    def launch(self, n: int = 2, offset: int = 0) -> None:
        """On `n` rows, with what there is per row `offset` entries into its buffers."""
        x, cap = torch.zeros(n, self.vocabulary, dtype=self.dtype), 0.5 + n if self.capped else None
        logits, tokens = Logits(x, cap), torch.zeros(n + offset, dtype=torch.int64)[offset:]
        out, weights = torch.zeros(4, n + offset)[:, offset:], torch.zeros(2, n)
        gradient = x if self.gradient is None else x.to(self.gradient)  # the chunk itself if that is its dtype
        match self.kernel:
            case "rows.token_nll":
                rows_triton.token_nll(logits, tokens, out, None if self.gradient is None else gradient)
            case "rows.token_nll_entropy":
                rows_triton.token_nll_entropy(logits, tokens, out, None)
            case "rows.entropy_gradient":
                rows_triton.entropy_gradient(logits, tokens, out, weights, gradient)
            case "tails.tail_sums":
                top_k_triton.tail_sums(x, cap, out)
            case "tails.tail_gradient":
                top_k_triton.tail_gradient(x, cap, out[0], out[1], gradient)


# Of token_nll one that is common, one that is heavy, and one that is neither; of the others the heaviest.
REPRESENTATIVE = (
    RowVariant("rows.token_nll", FP32, BF16, False, 151936),
    RowVariant("rows.token_nll", FP32, BF16, True, 50257),
    RowVariant("rows.token_nll", BF16, None, False, 50257),
    RowVariant("rows.token_nll_entropy", FP32, None, True, 50257),
    RowVariant("rows.entropy_gradient", FP32, BF16, True, 50257),
    RowVariant("tails.tail_sums", FP32, None, True, 50257),
    RowVariant("tails.tail_gradient", FP32, BF16, True, 50257),
)


def row_variants() -> Iterator[RowVariant]:
    for kernel, dtypes in FUNCTIONS.items():
        for (dtype, gradient), capped, vocabulary in itertools.product(dtypes, (False, True), (151936, 50257, 1)):
            yield RowVariant(kernel, dtype, gradient, capped, vocabulary)
