"""Whether the processes of a group were given the same tokens: what each was given as a few numbers, compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastkl.kernels.gemm import compute_dtype

SAMPLE = 64  # rows of the hidden states that are looked at
DIRECTIONS = 8  # that they are projected on
# Of the size that a projection of such rows has. Processes may differ by the rounding of their hidden states, which is a
# fifth of it in bfloat16. Those of other tokens differ by about the whole size, in every direction.
ROUNDING = 0.02
UNSHOWN = ("tokens", "masks", "hidden states")  # sums, which say nothing to a reader


def given(
    head: tuple[Tensor, Tensor, Tensor | None], tokens: Tensor | None, mask: Tensor, options: Mapping[str, Any]
) -> dict[str, float]:
    """What must be alike on all processes, by the names that an error has for it: hidden, weight, bias; tokens [...].

    As many numbers whatever was given.
    """
    hidden, grads, known = head[0].detach(), torch.is_grad_enabled(), options.get("vocab_size")
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows, wanted = flat.shape[0], [grads and t is not None and t.requires_grad for t in head]
    found: dict[str, float] = {
        "numbers of tokens": rows,
        "hidden sizes": flat.shape[1],
        "bytes per number": hidden.itemsize,
        "biases": head[2] is not None,
        "gradients to make": sum(2**i for i, one in enumerate(wanted) if one),
        "values of chunk_size": options["chunk_size"] or 0,
        "values of skip_zero_rows": bool(options["skip_zero_rows"]),
        "values of vocab_size": known if isinstance(known, int) else 0,
    }
    active, sums = hidden.new_ones(rows, dtype=torch.bool), dict[str, Tensor]()
    for name, one_each, nothing in (("tokens", tokens, options["ignore_index"]), ("masks", mask, 0.0)):
        own = flat.new_full((rows,), torch.nan) if one_each is None else one_each.detach().reshape(-1)
        own = own.to(torch.float64)
        sums[name] = (own * torch.arange(1, rows + 1, device=own.device)).sum()
        active = active & (own != nothing)
    sums |= dict(zip(_PROJECTIONS, _projections(_sample(flat, active)), strict=True))
    numbers = torch.stack([one.to(torch.float64) for one in sums.values()]).tolist()
    return found | dict(zip(sums, numbers, strict=True))


def differing(own: Mapping[str, float], found: Tensor) -> str:
    """What the processes, of `found` [processes, k], do not have alike, and their numbers; nothing if they agree."""
    for name, theirs in zip(own, found.unbind(1), strict=True):
        tolerance = ROUNDING if name in _PROJECTIONS else 0.0
        if not bool(torch.isclose(theirs, theirs[0], rtol=1e-12, atol=tolerance, equal_nan=True).all()):
            what = "hidden states" if name in _PROJECTIONS else name
            shown = "" if what in UNSHOWN else f" ({', '.join(f'{number:g}' for number in theirs.tolist())})"
            return f"different {what}{shown}"
    return ""


_PROJECTIONS = tuple(f"hidden states {i}" for i in range(DIRECTIONS + 1))


def _sample(hidden: Tensor, active: Tensor) -> Tensor:
    """Some rows, 0 where they take no part, in the compute dtype."""
    step = max(1, hidden.shape[0] // SAMPLE)
    return hidden[::step].masked_fill(~active[::step, None], 0.0).to(compute_dtype(hidden.dtype))


def _projections(rows: Tensor) -> list[Tensor]:
    """Sums of their numbers with signs that come and go, over the size that such a sum has; and the log of that."""
    i, j = (torch.arange(1, size + 1, device=rows.device, dtype=rows.dtype) for size in rows.shape)
    directions = torch.arange(1, DIRECTIONS + 1, device=rows.device, dtype=rows.dtype)
    sums = (rows * torch.cos(i)[:, None]).sum(0) @ torch.cos(j[:, None] * directions)
    # cos² cos² is a quarter on average.
    size = torch.linalg.vector_norm(rows).clamp(min=torch.finfo(rows.dtype).tiny) / 2
    return [*(sums / size).unbind(0), size.log()]
