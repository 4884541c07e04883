"""The kernels of the sparse backward's steps (`steps.py`).

How many columns are kept, K, is known on the device alone: kernels read it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fastkl.kernels.rows.walk import load_scores

PAD = tl.constexpr(64)  # û is followed by zeros up to a multiple of this, or the end of the row's room

# Declares a kernel of this room. These are the parameters that vary from call to call.
step_kernel: Callable[[Any], Any] = triton.jit(
    do_not_specialize=["n", "vocabulary", "seed_low", "seed_high", "block"],
    do_not_specialize_on_alignment=[
        *("weights_ptr", "partials_ptr", "norms_ptr", "tau_ptr", "counts_ptr", "ends_ptr", "ids_ptr", "inverse_ptr"),
        *("count_ptr", "slope_ptr", "excess_ptr", "centre_ptr"),
    ],
)


@step_kernel
def column_squares_kernel(
    # data
    u_ptr: tl.tensor,  # [n, V]
    weights_ptr: tl.tensor,  # [n]
    partials_ptr: tl.tensor,  # [splits of the rows, V]
    # shapes
    n: tl.tensor,
    vocabulary: tl.tensor,
    # strides
    u_stride_row: tl.tensor,
    # constants
    SPLIT: tl.constexpr,  # rows of a split, a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,  # rows held at a time
    BLOCK_N: tl.constexpr,
) -> None:
    """Σ weights[i] u[i, v]² over the rows of a split, in their order."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * SPLIT
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, min(first + SPLIT, n), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < n)[:, None]
        u_ptrs = u_ptr + rows.to(tl.int64)[:, None] * u_stride_row + columns[None, :]
        if tl.program_id(0) * BLOCK_N + BLOCK_N <= vocabulary:
            u = tl.load(u_ptrs, mask=inside, other=0.0)
        else:
            u = tl.load(u_ptrs, mask=inside & (columns < vocabulary)[None, :], other=0.0)
        u = u.to(tl.float32)
        weights = tl.load(weights_ptr + rows, mask=rows < n, other=0.0)
        total += tl.sum(u * u * weights[:, None], 0)
    partials_ptr += tl.program_id(1).to(tl.int64) * vocabulary
    tl.store(partials_ptr + columns, total, mask=columns < vocabulary)


@step_kernel
def count_columns_kernel(
    # data
    norms_ptr: tl.tensor,  # [V]
    tau_ptr: tl.tensor,  # [1]
    counts_ptr: tl.tensor,  # [tiles]
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    block: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # constants
    BLOCK_N: tl.constexpr,
) -> None:
    """How many columns of each tile are kept."""
    _, _, _, kept = _draw(norms_ptr, tau_ptr, seed_low, seed_high, block, vocabulary, BLOCK_N)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(kept, 0))


@step_kernel
def list_columns_kernel(
    # data
    norms_ptr: tl.tensor,  # [V]
    tau_ptr: tl.tensor,  # [1]
    counts_ptr: tl.tensor,  # [tiles]
    ends_ptr: tl.tensor,  # [tiles], their running sum
    ids_ptr: tl.tensor,  # [V] int32; the first K are written
    inverse_ptr: tl.tensor,  # [V]
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    block: tl.tensor,
    # shapes
    vocabulary: tl.tensor,
    # constants
    BLOCK_N: tl.constexpr,
) -> None:
    """The columns that are kept, in ascending order, and 1 / π of each."""
    tile = tl.program_id(0)
    columns, w, tau, kept = _draw(norms_ptr, tau_ptr, seed_low, seed_high, block, vocabulary, BLOCK_N)
    first = tl.load(ends_ptr + tile) - tl.load(counts_ptr + tile)
    places = first + tl.cumsum(kept, 0) - kept
    tl.store(ids_ptr + places, columns, mask=kept > 0)
    inverse = tau / w
    tl.store(inverse_ptr + places, tl.where(inverse > 1.0, inverse, 1.0), mask=kept > 0)  # 1 where it is NaN


@triton.jit
def _draw(
    norms_ptr: tl.tensor,
    tau_ptr: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    block: tl.tensor,
    vocabulary: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The columns of the program's tile, w, τ, and 1 where a column is kept, else 0.

    It is kept with probability w / τ; always if τ < 0, and where w is NaN. Independent for each (seed, block, column).
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = tl.load(norms_ptr + columns, mask=columns < vocabulary, other=0.0)
    tau = tl.load(tau_ptr)
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    none = columns * 0
    bits, _, _, _ = tl.philox(seed, columns, none + block, none, none)
    # Midpoints of a grid of 2⁻²³, exact in float32: never 0, so that 1 / π is bounded.
    random = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return columns, w, tau, tl.where((w <= random * tau) | (columns >= vocabulary), 0, 1)


@step_kernel
def compact_kernel(
    # data
    u_ptr: tl.tensor,  # [n, V]; û [n, K] afterwards, and zeros up to a multiple of PAD
    ids_ptr: tl.tensor,  # [V], the first K ascending
    inverse_ptr: tl.tensor,  # [V]
    count_ptr: tl.tensor,  # [1], K
    tau_ptr: tl.tensor,  # [1]
    excess_ptr: tl.tensor,  # [n], Σ û − Σ u
    # shapes
    vocabulary: tl.tensor,
    width: tl.tensor,  # elements of a row that may be written, V or the next multiple of PAD
    # strides
    u_stride_row: tl.tensor,
    # constants
    SUMMED: tl.constexpr,  # Σ u is not 0
    BLOCK_N: tl.constexpr,  # a multiple of PAD
) -> None:
    """u[:, ids[k]] / π moves to u[:, k], within the row that this program owns.

    Why nothing is read after it was overwritten. ids ascend without repetition, hence ids[k] ≥ k. Say a tile stands at
    [s, s + BLOCK_N). It stores there alone. Later tiles load from ids[k] ≥ k ≥ s + BLOCK_N, which it has not touched.
    Earlier tiles loaded before it stored, for each tile has a barrier between its loads and its stores. That barrier also
    parts the loads of a tile from its own stores: another thread's k may be this thread's ids[k]. The loads of Σ u come
    before the first barrier. A barrier orders the memory accesses of all warps of the program, and no other program has
    the row. A wave of an AMD chip may pass a barrier while its loads are under way: the sum over all warps in front of it
    needs what was loaded, and has a barrier after every warp has put its part into shared memory.
    The zeros behind û lie in the last tile, after all loads.
    """
    row = tl.program_id(0).to(tl.int64)  # n · V exceeds int32
    u_ptr += row * u_stride_row
    count = tl.load(count_ptr)
    excess = 0.0
    if tl.load(tau_ptr) >= 0.0:  # else all columns are kept as they are
        if SUMMED:
            lanes = tl.zeros([BLOCK_N], tl.float32)
            for start in range(0, vocabulary, BLOCK_N):
                lanes -= load_scores(u_ptr, None, start, vocabulary, 0.0, BLOCK_N)
            excess += tl.sum(lanes, 0)
        end = min(tl.cdiv(count, PAD) * PAD, width)
        for start in range(0, end, BLOCK_N):
            places = start + tl.arange(0, BLOCK_N)
            kept = places < count
            ids = tl.load(ids_ptr + places, mask=kept, other=0)
            u = tl.load(u_ptr + ids, mask=kept, other=0.0).to(tl.float32)
            u *= tl.load(inverse_ptr + places, mask=kept, other=0.0)
            stored = u.to(u_ptr.dtype.element_ty)
            excess += tl.sum(stored.to(tl.float32), 0)  # before the barrier: see above
            tl.debug_barrier()
            tl.store(u_ptr + places, stored, mask=places < end)
    else:
        beyond = vocabulary + tl.arange(0, PAD)
        tl.store(u_ptr + beyond, tl.zeros([PAD], tl.float32), mask=beyond < width)
    tl.store(excess_ptr + row, excess)


@step_kernel
def hidden_gradient_kernel(
    # data
    u_ptr: tl.tensor,  # [n, V], û in its first K columns
    w_ptr: tl.tensor,  # [V, D]
    ids_ptr: tl.tensor,  # [V]
    count_ptr: tl.tensor,  # [1], K
    slope_ptr: tl.tensor,  # [n]
    excess_ptr: tl.tensor,  # [n]
    centre_ptr: tl.tensor,  # [D]
    out_ptr: tl.tensor,  # [n, D]
    # shapes
    n: tl.tensor,
    width: tl.tensor,  # elements of a row of û that may be read
    dim: tl.tensor,
    # strides
    u_stride_row: tl.tensor,
    w_stride_row: tl.tensor,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides PAD
) -> None:
    """slope · (û W[ids] − excess · centre). Neighbours have the same columns of W, which then are read from memory once."""
    tiles = tl.cdiv(n, BLOCK_M)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < n
    inner = tl.arange(0, BLOCK_K)
    count = tl.load(count_ptr)
    owned = tl.minimum(rows, n - 1).to(tl.int64)  # rows beyond the end are read as the last one
    u_ptrs = u_ptr + owned[:, None] * u_stride_row + inner[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The ids come a step ahead. Loaded in the step that gathers by them, they would take a buffer's place in the pipeline.
    next_ids = tl.load(ids_ptr + inner, mask=inner < count, other=0)
    for start in range(0, count, BLOCK_K):
        places = start + inner
        kept = places < count
        ids = next_ids.to(tl.int64)
        next_ids = tl.load(ids_ptr + places + BLOCK_K, mask=places + BLOCK_K < count, other=0)
        a = tl.load(u_ptrs + start, mask=(places < width)[None, :], other=0.0)  # 0 beyond K
        b = tl.load(
            w_ptr + ids[:, None] * w_stride_row + columns[None, :],
            mask=kept[:, None] & (columns < dim)[None, :],
            other=0.0,
        )
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    slope = tl.load(slope_ptr + rows, mask=inside, other=0.0)
    excess = tl.load(excess_ptr + rows, mask=inside, other=0.0)
    centre = tl.load(centre_ptr + columns, mask=columns < dim, other=0.0)
    total = slope[:, None] * (total - excess[:, None] * centre[None, :])
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * dim + columns[None, :],
        total,
        mask=inside[:, None] & (columns < dim)[None, :],
    )


@step_kernel
def weight_gradient_kernel(
    # data
    u_ptr: tl.tensor,  # [n, V], û in its first K columns
    h_ptr: tl.tensor,  # [n, D]
    ids_ptr: tl.tensor,  # [V]
    count_ptr: tl.tensor,  # [1], K
    accumulator_ptr: tl.tensor,  # [V, D]
    # shapes
    n: tl.tensor,
    width: tl.tensor,  # elements of a row of û that may be read
    dim: tl.tensor,
    # strides
    u_stride_row: tl.tensor,
    h_stride_row: tl.tensor,
    accumulator_stride_row: tl.tensor,
    accumulator_stride_column: tl.tensor,
    # constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """accumulator[ids] += ûᵀ h. A tile of the result belongs to one program, and neighbours have the same columns of û."""
    count = tl.load(count_ptr)
    tiles = tl.cdiv(dim, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), tl.cdiv(count, BLOCK_M) * tiles, tl.num_programs(0)):
        places = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_K):
            rows = (start + inner).to(tl.int64)
            inside = (rows < n)[:, None]
            a = tl.load(
                u_ptr + rows[:, None] * u_stride_row + places[None, :],
                mask=inside & (places < width)[None, :],  # beyond K is what nobody stores
                other=0.0,
            )
            b = tl.load(
                h_ptr + rows[:, None] * h_stride_row + columns[None, :],
                mask=inside & (columns < dim)[None, :],
                other=0.0,
            )
            total = tl.dot(a.T, b, total, input_precision="ieee")
        kept = places < count
        ids = tl.load(ids_ptr + places, mask=kept, other=0).to(tl.int64)
        row_ptrs = accumulator_ptr + ids * accumulator_stride_row
        # Half of the columns after the other: pointers and sums of all of them would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        first = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _add(row_ptrs, first, left, kept, dim, accumulator_stride_column)
        _add(row_ptrs, first + BLOCK_N // 2, right, kept, dim, accumulator_stride_column)


@triton.jit
def _add(
    row_ptrs: tl.tensor, columns: tl.tensor, total: tl.tensor, kept: tl.tensor, dim: tl.tensor, stride: tl.tensor
) -> None:
    ptrs = row_ptrs[:, None] + columns[None, :] * stride
    inside = kept[:, None] & (columns < dim)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside, other=0.0) + total, mask=inside)
