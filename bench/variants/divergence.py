"""What the divergence kernel is compiled for (`kernels/divergence/triton.py`)."""

from __future__ import annotations

from typing import Any, get_args

import torch

from bench.variants.launcher import BF16, BOTH, CUT, FP32, Launcher, Options, chunk, grid
from bench.variants.rows import GRADIENTS, ROW_WIDTHS, VALUES, rows
from fastkl.kernels.divergence.formula import ROWS, ROWS_WITH_EXTRAS, Divergence, HardTarget
from fastkl.kernels.divergence.triton import divergence


def _call(
    n: int,
    offset: int,
    kind: Divergence,
    capped_teacher: bool,
    tokens: bool,
    extras: bool,
    hard: bool = False,
    teacher_bias: bool = False,
    **options: Any,
) -> None:
    logits, ids, _, gradient = rows(n, offset, **options)
    teacher_cap = 0.5 + n if capped_teacher else None
    teacher = chunk(n, logits.student.shape[1], logits.student.dtype)
    own = torch.zeros(teacher.shape[1]) if teacher_bias else None
    logits = logits._replace(teacher=teacher, teacher_cap=teacher_cap, teacher_bias=own)
    values = torch.zeros(9, n + offset)[: (ROWS_WITH_EXTRAS if extras else ROWS) + hard, offset:]
    target = HardTarget(0.25, 0.5 + n) if hard else None
    divergence(kind, 0.125 / n, logits, ids if tokens else None, values, gradient, target)


def _variants(extras: bool) -> list[Options]:
    plain = grid(
        kind=get_args(Divergence),
        dtypes=VALUES + GRADIENTS,
        vocabulary=ROW_WIDTHS,
        capped=BOTH,
        capped_teacher=BOTH,
        tokens=BOTH,
        extras=(extras,),
    )
    return plain + [one | BIASES for one in plain if one["vocabulary"] in (CUT, 50257)]


def _one(kind: Divergence, dtypes: tuple[torch.dtype, torch.dtype], vocabulary: int, **flags: bool) -> Options:
    flags = dict.fromkeys(("capped", "capped_teacher", "tokens", "extras"), False) | flags
    return {"kind": kind, "dtypes": dtypes, "vocabulary": vocabulary, **flags}


BIASES = {"bias": True, "teacher_bias": True}
HEAVIEST = _one("jsd", (FP32, BF16), 50257, capped=True, capped_teacher=True, tokens=True, extras=True)
LAUNCHERS = [
    Launcher(
        "divergence.divergence",
        _call,
        _variants(extras=False),
        [  # two that are common, and the one that leaves least room for a second program
            _one("skewed_reverse_kl", (FP32, BF16), CUT, tokens=True),
            _one("forward_kl", (BF16, BF16), 151936),
            _one("skewed_forward_kl", (FP32, BF16), 50257, capped=True, capped_teacher=True, tokens=True),
            _one("skewed_forward_kl", (FP32, BF16), 50257, capped=True, capped_teacher=True, tokens=True) | BIASES,
            _one("forward_kl", (FP32, BF16), CUT) | BIASES,
            _one("density_power", (FP32, BF16), 50257, capped=True, capped_teacher=True, tokens=True) | BIASES,
        ],
    ),
    Launcher(
        "divergence.divergence",
        _call,
        _variants(extras=True),
        [HEAVIEST, HEAVIEST | BIASES],
        programs=1,
    ),
    Launcher(
        "divergence.divergence",
        _call,
        [one | {"tokens": True, "hard": True} for extras in BOTH for one in _variants(extras) if one["tokens"]],
        [HEAVIEST | {"hard": True}, HEAVIEST | {"hard": True} | BIASES],
        programs=1,
    ),
]
