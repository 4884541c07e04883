"""What the programs of this room do tile by tile: which tile, its product with the head, the score of a token.

A kernel that multiplies owns a tile of rows and walks over tiles of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import LOG2E, finite_or_zero


@triton.jit
def work_item(n: tl.tensor, splits: tl.tensor, group: tl.tensor, BLOCK_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First row and split of this program; the row tiles of a group are neighbours."""
    program = tl.program_id(0)
    first = program // (group * splits) * group
    height = min(tl.cdiv(n, BLOCK_M) - first, group)
    within = program % (group * splits)
    return (first + within % height) * BLOCK_M, within // height


@triton.jit
def scores(
    h: tl.tensor,
    w: tl.tensor,
    bias_ptr: tl.tensor,
    alpha: tl.tensor,
    first_row: tl.tensor,
    start: tl.tensor,
    n: tl.tensor,
    vocabulary: tl.tensor,
    dim: tl.tensor,
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    CAPPED: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A tile of s; −inf beyond the vocabulary."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, dim, BLOCK_K):
        product = step(
            product, h, w, first_row, start, done, n, vocabulary, dim, h_stride_row, w_stride_row,
            EVEN_K, TMA, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    return finished(product, bias_ptr, alpha, start, vocabulary, CAPPED, BLOCK_N)


@triton.jit
def step(
    product: tl.tensor,
    h: tl.tensor,
    w: tl.tensor,
    first_row: tl.tensor,
    start: tl.tensor,
    done: tl.tensor,
    n: tl.tensor,
    vocabulary: tl.tensor,
    dim: tl.tensor,
    h_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """`product` plus that of the next BLOCK_K of D, after `done` of them."""
    if TMA:
        a = h.load([first_row, done])
        b = w.load([start, done]).T
    else:  # rows and columns beyond the end are read as the last one
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)  # n · D and V · D exceed int32
        columns = tl.minimum(start + tl.arange(0, BLOCK_N), vocabulary - 1).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        h_ptrs = h + rows[:, None] * h_stride_row + k[None, :] + done
        w_ptrs = w + columns[None, :] * w_stride_row + k[:, None] + done
        if EVEN_K:
            a = tl.load(h_ptrs)
            b = tl.load(w_ptrs)
        else:
            a = tl.load(h_ptrs, mask=k[None, :] < dim - done, other=0.0)
            b = tl.load(w_ptrs, mask=k[:, None] < dim - done, other=0.0)
    return tl.dot(a, b, product, input_precision="ieee")


@triton.jit
def finished(
    product: tl.tensor,
    bias_ptr: tl.tensor,
    alpha: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """A tile of s from its product; −inf beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        product = tanh_base2(product * alpha)
    return tl.where((columns < vocabulary)[None, :], product, float("-inf"))


@triton.jit
def load_tokens(
    tokens_ptr: tl.tensor, rows: tl.tensor, n: tl.tensor, vocabulary: tl.tensor, tokens_stride: tl.tensor
) -> tl.tensor:
    """The tokens of `rows`; −1 where there is no such token."""
    y = tl.load(tokens_ptr + rows.to(tl.int64) * tokens_stride, mask=rows < n, other=-1)
    return tl.where((y >= 0) & (y < vocabulary), y, -1).to(tl.int32)


@triton.jit
def store_targets(
    targets_ptr: tl.tensor, s: tl.tensor, y: tl.tensor, rows: tl.tensor, start: tl.tensor, BLOCK_N: tl.constexpr
) -> None:
    """Stores s[y] for the rows whose token is in this tile. Most tiles have none and skip the search."""
    in_tile = (y >= start) & (y < start + BLOCK_N)
    if tl.max(in_tile.to(tl.int32), 0) > 0:
        columns = start + tl.arange(0, BLOCK_N)
        target = tl.sum(tl.where(columns[None, :] == y[:, None], s, 0.0), 1)
        tl.store(targets_ptr + rows, target, mask=in_tile)


@triton.jit
def raise_max(m: tl.tensor, s: tl.tensor, scale: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each row: m' = max(m, max s); what to subtract, m'; c (m − m'). The last two are 0 while all s were −inf."""
    raised = tl.maximum(m, tl.max(s, 1))
    base = finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, (m - base) * (scale * LOG2E))


@triton.jit
def carry_base2(weighted: tl.tensor, total: tl.tensor, shift: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """2^d (Σ 2^a x + l d_x); 0 where nothing of l remains, for d may be infinite there."""
    return tl.where(total * factor > 0.0, factor * tl.fma(total, shift, weighted), 0.0)


@triton.jit
def tanh_base2(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = tl.fma(s, tl.fma(s, tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0), 2.0 / 15.0), -1.0 / 3.0)
    far = tl.where(x < 0.0, -far, far)
    near = tl.fma(x * s, near, x)
    return tl.where(tl.abs(x) < 0.25, near, far)
