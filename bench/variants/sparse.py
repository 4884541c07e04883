"""What the kernels of the sparse backward are compiled for (`kernels/sparse/steps.py`).

No variant has a vocabulary of one word, for which the compiler spills registers in two steps: nobody has one.
"""

from __future__ import annotations

import torch

from bench.variants.launcher import BF16, BOTH, CUT, FP16, FP32, WIDTHS, Launcher, chunk, grid
from fastkl.kernels.sparse import steps

DTYPES = (FP32, BF16, FP16)


def _selection(vocabulary: int) -> steps.Selection:
    ids, kept = torch.empty(vocabulary, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    return steps.Selection(ids, torch.empty(vocabulary), kept, torch.empty(1))


def _column_squares(n: int, offset: int, dtype: torch.dtype, vocabulary: int) -> None:
    steps.column_squares(chunk(n, vocabulary, dtype), torch.empty(n + offset)[offset:])


def _select_columns(n: int, offset: int, vocabulary: int) -> None:
    steps.select_columns(torch.empty(vocabulary), torch.empty(1), seed=n << 31, block=n)


def _compact(n: int, offset: int, dtype: torch.dtype, vocabulary: int, summed: bool) -> None:
    steps.compact(chunk(n, vocabulary, dtype), _selection(vocabulary), summed)


def _hidden_gradient(n: int, offset: int, dtype: torch.dtype, vocabulary: int, dim: int) -> None:
    u, weight = chunk(n, vocabulary, dtype), torch.empty(vocabulary, dim, dtype=dtype)
    slope = excess = torch.empty(n + offset)[offset:]
    steps.hidden_gradient(u, weight, _selection(vocabulary), slope, excess, torch.empty(dim))


def _add_to_weight_gradient(n: int, offset: int, dtype: torch.dtype, vocabulary: int, dim: int) -> None:
    u, hidden = chunk(n, vocabulary, dtype), torch.empty(n, dim, dtype=dtype)
    steps.add_to_weight_gradient(torch.empty(vocabulary, dim), u, hidden, _selection(vocabulary))


WITH_CUT = (*WIDTHS, CUT)
STEPS = grid(dtype=DTYPES, vocabulary=WITH_CUT)
COMPACTIONS = grid(dtype=DTYPES, vocabulary=WITH_CUT, summed=BOTH)
PRODUCTS = grid(dtype=DTYPES, vocabulary=WITH_CUT, dim=(512, 513))
COMMON = {"dtype": BF16, "vocabulary": CUT}
PRODUCT = COMMON | {"dim": 512}
ODD_PRODUCT = {"dtype": FP16, "vocabulary": 50257, "dim": 513}
# Representative: each step as it is most often, and what is heaviest.
LAUNCHERS = [
    Launcher("sparse.count_columns", _select_columns, grid(vocabulary=WIDTHS), [{"vocabulary": 151936}]),
    Launcher("sparse.column_squares", _column_squares, STEPS, [COMMON]),
    Launcher("sparse.compact", _compact, COMPACTIONS, [COMMON | {"summed": True}]),
    *(
        Launcher(kernel, call, PRODUCTS, [PRODUCT, ODD_PRODUCT], programs=1, multiplies=True)
        for kernel, call in (
            ("sparse.hidden_gradient", _hidden_gradient),
            ("sparse.weight_gradient", _add_to_weight_gradient),
        )
    ),
]
