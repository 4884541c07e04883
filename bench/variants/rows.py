"""What the row kernels of one chunk are compiled for (`kernels/rows/triton.py`, `kernels/top_k/triton.py`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.variants.launcher import BF16, BOTH, CUT, FP16, FP32, WIDTHS, Launcher, Options, chunk, grid
from fastkl.kernels.options import CrossEntropy
from fastkl.kernels.rows.cross_entropy.triton import cross_entropy
from fastkl.kernels.rows.interface import Logits
from fastkl.kernels.rows.triton import clear_rows, entropy_gradient, token_nll, token_nll_entropy
from fastkl.kernels.top_k.triton import tail_gradient, tail_sums

# The dtypes of chunk and gradient, without one and with one.
VALUES: list[tuple[torch.dtype, torch.dtype | None]] = [(FP32, None), (BF16, None)]
GRADIENTS: list[tuple[torch.dtype, torch.dtype | None]] = [(FP32, FP32), (BF16, BF16), (FP32, BF16), (FP32, FP16)]
ROW_WIDTHS = (*WIDTHS, CUT, 1)  # 1 is a case of its own to Triton


class Rows(NamedTuple):
    logits: Logits
    tokens: Tensor
    out: Tensor  # [8, n]
    gradient: Tensor | None  # the chunk itself if that is its dtype


def rows(
    n: int,
    offset: int,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    capped: bool,
    vocabulary: int,
    bias: bool = False,
) -> Rows:
    """A chunk and what belongs to it."""
    x = chunk(n, vocabulary, dtypes[0])
    tokens, out = torch.zeros(n + offset, dtype=torch.int64)[offset:], torch.zeros(8, n + offset)[:, offset:]
    gradient = None if dtypes[1] is None else x if dtypes[1] == x.dtype else chunk(n, vocabulary, dtypes[1])
    own = torch.zeros(vocabulary) if bias else None
    return Rows(Logits(x, 0.5 + n if capped else None, student_bias=own), tokens, out, gradient)


def _token_nll(n: int, offset: int, **options: Any) -> None:
    token_nll(*rows(n, offset, **options))


def _token_nll_entropy(n: int, offset: int, **options: Any) -> None:
    token_nll_entropy(*rows(n, offset, **options))


def _cross_entropy(n: int, offset: int, label_smoothing: float, class_weight: bool, ids: bool, **options: Any) -> None:
    logits, tokens, out, gradient = rows(n, offset, **options)
    c = torch.ones(logits.student.shape[1]) if class_weight else None
    terms = CrossEntropy(label_smoothing, 0.5 / (n + offset))
    cross_entropy(terms, logits._replace(class_weight=c), tokens, out[: 5 if ids else 4], gradient)


def _entropy_gradient(n: int, offset: int, **options: Any) -> None:
    logits, tokens, out, gradient = rows(n, offset, **options)
    assert gradient is not None
    entropy_gradient(logits, tokens, out, torch.zeros(3, n), gradient)


def _clear_rows(n: int, offset: int, **options: Any) -> None:
    _, _, out, gradient = rows(n, offset, capped=False, **options)
    assert gradient is not None
    clear_rows(gradient, out[0])


def _tail_sums(n: int, offset: int, hard: bool = False, **options: Any) -> None:
    logits, _, out, _ = rows(n, offset, **options)
    tail_sums(logits, out, 0.5 + n if hard else None)


def _tail_gradient(n: int, offset: int, hard: bool = False, **options: Any) -> None:
    logits, _, out, gradient = rows(n, offset, **options)
    assert gradient is not None
    tail_gradient(logits, out[0], out[1], gradient, out[2] if hard else None, 0.5 + n)


def _variants(dtypes: list[tuple[torch.dtype, torch.dtype | None]]) -> list[Options]:
    return with_and_without("bias", grid(dtypes=dtypes, capped=BOTH, vocabulary=ROW_WIDTHS))


def with_and_without(flag: str, variants: list[Options]) -> list[Options]:
    return [*variants, *(one | {flag: True} for one in variants)]


PLAIN_TARGETS = {"label_smoothing": 0.0, "class_weight": False, "ids": False}
ALL_TARGETS = {"label_smoothing": 0.1, "class_weight": True, "ids": True}
HEAVY_VALUES = {"dtypes": (FP32, None), "capped": True, "vocabulary": 50257}
HEAVY_GRADIENT = HEAVY_VALUES | {"dtypes": (FP32, BF16)}
LAUNCHERS = [
    Launcher(
        "rows.token_nll",
        _token_nll,
        _variants(VALUES + GRADIENTS),
        [  # one that is common, one that is heavy, and one that is neither
            {"dtypes": (FP32, BF16), "capped": False, "vocabulary": CUT},
            {"dtypes": (FP32, BF16), "capped": False, "vocabulary": CUT, "bias": True},
            HEAVY_GRADIENT,
            HEAVY_GRADIENT | {"bias": True},
            {"dtypes": (BF16, None), "capped": False, "vocabulary": 50257},
        ],
    ),
    Launcher(
        "rows.token_nll_entropy", _token_nll_entropy, _variants(VALUES), [HEAVY_VALUES, HEAVY_VALUES | {"bias": True}]
    ),
    Launcher(
        "cross_entropy.cross_entropy",
        _cross_entropy,
        [
            one | more
            for one in _variants(VALUES + GRADIENTS)
            for more in grid(label_smoothing=[0.0, 0.1], class_weight=BOTH, ids=BOTH)
            if not one.get("bias") or more in (PLAIN_TARGETS, ALL_TARGETS)
        ],
        [
            {"dtypes": (FP32, BF16), "capped": False, "vocabulary": 151936} | PLAIN_TARGETS,
            HEAVY_GRADIENT | {"label_smoothing": 0.1, "class_weight": True, "ids": False},
            HEAVY_GRADIENT | ALL_TARGETS,
            HEAVY_GRADIENT | ALL_TARGETS | {"bias": True},
        ],
        programs=1,  # smoothing or ids need too many registers for two
    ),
    Launcher(
        "rows.entropy_gradient",
        _entropy_gradient,
        _variants(GRADIENTS),
        [HEAVY_GRADIENT, HEAVY_GRADIENT | {"bias": True}],
    ),
    Launcher(
        "rows.clear_rows",
        _clear_rows,
        grid(dtypes=GRADIENTS, vocabulary=ROW_WIDTHS),
        [{"dtypes": (FP32, BF16), "vocabulary": 50257}],
    ),
    Launcher(
        "top_k.tail_sums",
        _tail_sums,
        with_and_without("hard", _variants(VALUES)),
        [HEAVY_VALUES, HEAVY_VALUES | {"hard": True}, HEAVY_VALUES | {"hard": True, "bias": True}],
    ),
    Launcher(
        "top_k.tail_gradient",
        _tail_gradient,
        with_and_without("hard", _variants(GRADIENTS)),
        [HEAVY_GRADIENT, HEAVY_GRADIENT | {"hard": True}, HEAVY_GRADIENT | {"hard": True, "bias": True}],
    ),
]
