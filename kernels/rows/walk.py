"""What the programs of row kernels do block by block.

A program walks its row in blocks of BLOCK_N logits: once to gather everything the values need, and once more, if a gradient
is wanted, to write it, over the row or elsewhere. With m the largest logit, everything is made of a = z − m, so that
e^a ≤ 1, and of l = Σ e^a: written this way logits of any common size cancel before anything is rounded. m is not known
beforehand. When a block raises it from m to m', what was summed is carried over; a term x that moves by d (which is
m − m' for a itself) makes that

    l ← e^(m − m') l                  Σ e^a x ← e^(m − m') (Σ e^a x + d l)

A maximum of the row would cost a barrier of all threads in every block. So each *lane*, LANE neighbours that one thread
has, keeps a maximum and sums of its own, and after the walk the lanes are merged in the same way (`merge`).

The block at the end of the vocabulary alone is masked. The others move 16 bytes at a time wherever the distances of rows
are multiples of 16 elements, however odd the vocabulary; what lies between two rows is neither read nor written.

A bias of the head is added in each load, for a product that leaves its accumulators in fp32 would take a pass for that;
each program reads it from the L2 cache. A soft-cap, z = cap · tanh(x + bias), is applied after, and
dz/dx = (cap − z)(cap + z) / cap before the store.

The rules of `pytorch.py` at the edges: a token with z = −inf or p = 0 adds nothing; NaN, +inf and rows of nothing but
−inf end in NaN. Where `pytorch.py` hits a device-side assertion, for a token id outside the vocabulary, the row becomes
NaN here.

e^a is made as a power of 2, and is 0 below 2^−126. Sums are taken per lane and then in a tree, without atomics: the same
row gives the same bits, whatever rows surround it.
`score/tiles.py` has `raise_max`, `carry` and `tanh` of its own: in powers of 2, which have other bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANE = tl.constexpr(4)  # divides BLOCK_N; 16 bytes of float32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_block(
    x_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The logits z of a block; −inf beyond the vocabulary."""
    z = load_scores(x_ptr, x_bias_ptr, start, vocabulary, float("-inf"), BLOCK_N)
    if CAPPED:
        z = tl.where(start + tl.arange(0, BLOCK_N) < vocabulary, cap * tanh(z), float("-inf"))
    return z


@triton.jit
def load_scores(
    x_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    beyond: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """A block of x + bias in float32; `beyond` where the vocabulary ends, which the last block alone looks for."""
    columns = start + tl.arange(0, BLOCK_N)
    if start + BLOCK_N <= vocabulary:
        x = tl.load(x_ptr + columns).to(tl.float32)
        if x_bias_ptr is not None:
            x += tl.load(x_bias_ptr + columns)
    else:
        inside = columns < vocabulary
        x = tl.load(x_ptr + columns, mask=inside, other=beyond).to(tl.float32)
        if x_bias_ptr is not None:
            x += tl.load(x_bias_ptr + columns, mask=inside, other=0.0)
    return x


@triton.jit
def store_block(u_ptr: tl.tensor, start: tl.tensor, vocabulary: tl.tensor, u: tl.tensor, BLOCK_N: tl.constexpr) -> None:
    """Stores a block, and nothing beyond the vocabulary."""
    columns = start + tl.arange(0, BLOCK_N)
    if start + BLOCK_N <= vocabulary:
        tl.store(u_ptr + columns, u)
    else:
        tl.store(u_ptr + columns, u, mask=columns < vocabulary)


@triton.jit
def load_one(
    x_ptr: tl.tensor,
    x_bias_ptr: tl.tensor,
    y: tl.tensor,
    vocabulary: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
) -> tl.tensor:
    """The logit of token y; NaN if there is no such token."""
    inside = (y >= 0) & (y < vocabulary)
    z = tl.load(x_ptr + y, mask=inside, other=float("nan")).to(tl.float32)
    if x_bias_ptr is not None:
        z += tl.load(x_bias_ptr + y, mask=inside, other=0.0)
    if CAPPED:
        z = cap * tanh(z)
    return z


@triton.jit
def store_gradient(
    u_ptr: tl.tensor,
    start: tl.tensor,
    vocabulary: tl.tensor,
    u: tl.tensor,
    z: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Stores u · dz/dx of a block."""
    if CAPPED:
        u *= slope_of_cap(z, cap)
    store_block(u_ptr, start, vocabulary, u, BLOCK_N)


@triton.jit
def slope_of_cap(z: tl.tensor, cap: tl.tensor) -> tl.tensor:
    """dz/dx."""
    return (cap - z) * (cap + z) * (1.0 / cap)


@triton.jit
def exp(a: tl.tensor) -> tl.tensor:
    """e^a; `tl.exp` takes three more instructions for what is below 2^−126."""
    return tl.exp2(a * LOG2E)


@triton.jit
def from_end(done: tl.tensor, vocabulary: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Where the block after `done` logits starts in a walk from the end: what was read last is still in the L2 cache."""
    return (vocabulary - 1) // BLOCK_N * BLOCK_N - done


@triton.jit
def lanes(value: tl.constexpr, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr = tl.float32) -> tl.tensor:
    """A number for each lane of a block."""
    return tl.full([BLOCK_N // LANE], value, DTYPE)


@triton.jit
def lane_sum(x: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    return tl.sum(tl.reshape(x, (BLOCK_N // LANE, LANE)), 1)


@triton.jit
def lane_max(x: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    return tl.max(tl.reshape(x, (BLOCK_N // LANE, LANE)), 1)


@triton.jit
def spread(x: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The number of each lane at each of its elements."""
    return tl.reshape(tl.broadcast_to(x[:, None], (BLOCK_N // LANE, LANE)), (BLOCK_N,))


@triton.jit
def raise_lanes(m: tl.tensor, z: tl.tensor, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each lane: m' = max(m, max z); what to subtract, m'; m − m'. The last two are 0 while all z were −inf."""
    raised = tl.maximum(m, lane_max(z, BLOCK_N))
    base = finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, m - base)


@triton.jit
def first_maxima(top: tl.tensor, m: tl.tensor, z: tl.tensor, start: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Of each lane, where the largest z is found first, after a block; m and `top` are those before it."""
    by_lane = tl.reshape(z, (BLOCK_N // LANE, LANE))
    place = start + tl.arange(0, BLOCK_N // LANE) * LANE + tl.argmax(by_lane, 1)
    return tl.where(tl.max(by_lane, 1) > m, place, top)


@triton.jit
def merge(m: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """For the row, what to subtract: the maximum of all lanes. And how far each lane's own lies below it, at most 0."""
    base = finite_or_zero(tl.max(m, 0))
    return base, tl.where(m == float("-inf"), 0.0, m - base)


@triton.jit
def first_maximum(top: tl.tensor, m: tl.tensor, vocabulary: tl.tensor) -> tl.tensor:
    """For the row, where its largest z is found first, from those of all lanes."""
    return tl.min(tl.where(m == tl.max(m, 0), top, vocabulary), 0)


@triton.jit
def finite_or_zero(m: tl.tensor) -> tl.tensor:
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def carry(weighted: tl.tensor, total: tl.tensor, shift: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """Σ e^a x, with `total` l, after the maximum was raised by −log(factor), which moved every x by `shift`."""
    return tl.where(factor > 0.0, (weighted + total * shift) * factor, 0.0)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
