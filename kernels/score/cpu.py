"""Values straight from hidden states and the weight of the LM head, for a CPU: no logits in memory.

A tile of scores z [rows, TILE_COLUMNS] is made, reduced while it is in the cache, and overwritten by the next one of the
vocabulary. With m the largest score of a row so far and e = exp(z − m),

    l = Σ e                         out[0] = m − z[y] + log l
    s = Σ e (z − m)                 out[1] = log l − s / l          the entropy, if it is asked for, with m, log l, m − z[y]

A tile that raises m carries l and s over as `rows/walk.py` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkl.kernels.gemm import TILE_COLUMNS, even_chunks, most_rows, project
from fastkl.kernels.problem import Inputs, Spec
from fastkl.kernels.rows.pytorch import apply_cap

ROWS = 512  # of a tile: fewer read the weight too often, more leave the cache


def token_nll(spec: Spec, inputs: Inputs, out: Tensor) -> None:
    """out[0] = −log p[y]; of kind "token_nll_entropy" also H, m, log l and m − z[y]; out [K, N]."""
    n = inputs.hidden.shape[0]
    chunks = even_chunks(n, spec.chunk_size or ROWS)
    buffer = out.new_empty(most_rows(chunks) * min(TILE_COLUMNS, inputs.weight.shape[0]))
    assert inputs.tokens is not None
    for rows in chunks:
        part = inputs._replace(hidden=inputs.hidden[rows].to(out.dtype), tokens=inputs.tokens[rows])
        _score(spec, part, buffer, out[:, rows])


def _score(spec: Spec, inputs: Inputs, buffer: Tensor, out: Tensor) -> None:
    n, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
    y, entropy, lowest = inputs.tokens, spec.kind == "token_nll_entropy", torch.finfo(out.dtype).min
    assert y is not None
    m, target = (out.new_full((n,), value) for value in (-torch.inf, torch.nan))
    total, weighted = out.new_zeros(n), out.new_zeros(n)
    for start in range(0, vocabulary, TILE_COLUMNS):
        columns = slice(start, min(start + TILE_COLUMNS, vocabulary))
        width = columns.stop - start
        z = buffer[: n * width].view(n, width)
        bias = None if inputs.bias is None else inputs.bias[columns]
        project(inputs.hidden, inputs.weight[columns], bias, spec.student.alpha, z)
        apply_cap(z, spec.student.cap, keep=False)
        in_tile = (y >= start) & (y < columns.stop)
        target = torch.where(in_tile, z.gather(1, (y - start).clamp(0, width - 1)[:, None]).squeeze(1), target)
        old, m = m, torch.maximum(m, z.amax(-1))
        finite = m.clamp(min=lowest)  # for a row that has had no entry but −inf
        shift = (old - finite).clamp_(min=lowest)
        factor = shift.exp()
        z.sub_(finite[:, None])
        if entropy:
            weighted.addcmul_(total, shift).mul_(factor)
            e = z.exp()
            weighted.add_(e.mul(z.clamp_(min=lowest)).sum(-1))
        else:
            e = z.exp_()
        total.mul_(factor).add_(e.sum(-1))
    log_total = total.log()
    out[0] = (m - target) + log_total  # in this order: large logits cancel before anything is rounded
    if entropy:
        out[1] = log_total - weighted / total
        out[2], out[3], out[4] = m, log_total, m - target
