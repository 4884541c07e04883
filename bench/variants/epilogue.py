"""What the plan without logits is compiled for (`kernels/epilogue/triton.py`): three kernels, two of them again."""

from __future__ import annotations

import torch

from bench.variants.launcher import BF16, BOTH, FP16, Launcher, Options, grid
from fastkl.kernels.epilogue.triton import token_nll
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score.triton import Head

# dtype and D, as for scores; rows of u have room up to a multiple of 64 but where there are no vectors anyway.
OPERANDS = [(BF16, 512), (BF16, 528), (BF16, 513), (FP16, 520)]


def _token_nll(
    n: int, offset: int, operands: tuple[torch.dtype, int], capped: bool, bias: bool, vocabulary: int
) -> None:
    dtype, dim = operands
    hidden, weight = (torch.empty(rows, dim, dtype=dtype) for rows in (n, vocabulary))
    options = HeadOptions(temperature=0.5 + n, softcap=0.5 + n if capped else None)
    head = Head(hidden, weight, torch.empty(vocabulary, dtype=dtype) if bias else None, options)
    tokens, logprobs = (torch.zeros(n + offset, dtype=t)[offset:] for t in (torch.int64, torch.float32))
    room = 64 if dim % 8 == 0 else 1
    u = torch.empty(n, -(-vocabulary // room) * room, dtype=dtype)[:, :vocabulary]
    token_nll(head, tokens, logprobs, torch.empty(1, n + offset)[:, offset:], u)


COMMON: Options = {"operands": (BF16, 512), "capped": False, "bias": False, "vocabulary": 4096}
LAUNCHERS = [
    Launcher(
        "epilogue.reference",
        _token_nll,
        [
            *grid(operands=OPERANDS, capped=BOTH, bias=BOTH, vocabulary=[4096]),
            *grid(operands=OPERANDS, capped=[False], bias=[False], vocabulary=[4097]),
        ],
        [COMMON, COMMON | {"operands": (BF16, 513), "capped": True, "bias": True}],
        programs=1,
    ),
]
