"""What the scoring kernels are compiled for (`kernels/score/triton.py`): one that multiplies and one that merges."""

from __future__ import annotations

from typing import Any

import torch

from bench.variants.launcher import BF16, BOTH, FP16, FP32, Launcher, Options, grid
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score.triton import Head, reverse_kl, token_nll

# dtype and D: at 512 the steps of D come out even; at 528 they do not; 520 has no vectors, but descriptors; 513 neither.
OPERANDS = [(BF16, 512), (BF16, 528), (BF16, 513), (FP32, 512), (FP32, 513), (FP16, 520)]


def _head(n: int, operands: tuple[torch.dtype, int], capped: bool, bias: bool, vocabulary: int) -> Head:
    dtype, dim = operands
    hidden, weight = (torch.empty(rows, dim, dtype=dtype) for rows in (n, vocabulary))
    options = HeadOptions(temperature=0.5 + n, softcap=0.5 + n if capped else None)
    return Head(hidden, weight, torch.empty(vocabulary, dtype=dtype) if bias else None, options)


def _token_nll(n: int, offset: int, entropy: bool, **head: Any) -> None:
    token_nll(_head(n, **head), *_rows(n, offset, 5 if entropy else 1), entropy)


def _reverse_kl(n: int, offset: int, capped: bool, capped_teacher: bool, tokens: bool, **head: Any) -> None:
    student, teacher = _head(n, capped=capped, **head), _head(n, capped=capped_teacher, **head)
    ids, out = _rows(n, offset, 2)
    reverse_kl(student, teacher, ids if tokens else None, out)


def _rows(n: int, offset: int, values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and values."""
    return torch.zeros(n + offset, dtype=torch.int64)[offset:], torch.empty(values, n + offset)[:, offset:]


COMMON: Options = {"operands": (BF16, 512), "capped": False, "bias": False, "vocabulary": 4096}
TOKEN_NLL = COMMON | {"entropy": False}
REVERSE_KL = COMMON | {"capped_teacher": True, "tokens": True}
# Representative: a common one of each function, and one of each that lacks what makes that one fast.
LAUNCHERS = [
    Launcher(
        "score.token_nll",
        _token_nll,
        [
            *grid(operands=OPERANDS, capped=BOTH, bias=BOTH, entropy=BOTH, vocabulary=[4096]),
            TOKEN_NLL | {"vocabulary": 4097},
        ],
        [TOKEN_NLL, TOKEN_NLL | {"operands": (BF16, 528), "bias": True, "entropy": True}],
        programs=1,
        multiplies=True,
    ),
    Launcher(
        "score.reverse_kl",
        _reverse_kl,
        [
            *grid(operands=OPERANDS, capped=BOTH, capped_teacher=BOTH, bias=BOTH, tokens=[True], vocabulary=[4096]),
            REVERSE_KL | {"capped_teacher": False, "tokens": False, "vocabulary": 4097},
        ],
        [REVERSE_KL, REVERSE_KL | {"operands": (FP16, 520), "capped": True, "capped_teacher": False, "bias": True}],
        programs=1,
        multiplies=True,
    ),
]
