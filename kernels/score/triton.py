"""Values straight from hidden states and the weight of the LM head, in Triton: no logits in memory.

Here are the formulas, the schedule and the launches. `tile_kernels.py` multiplies and reduces, by `tiles.py` tile by tile;
`merge_kernels.py` merges.

A program multiplies a tile of rows with one tile of the vocabulary after the other and reduces each product while it is
in registers. The score of a token is kept as s = h·w + b, or tanh(alpha (h·w + b)) where the head has a soft-cap, so
that z = scale · s with scale = alpha > 0, or cap. With m the largest s so far, in units of log 2 (c = scale · log₂ e),
and, with subscript t, for the teacher:

    a = c (s − m)                     l = Σ 2^a         p = 2^a / l       lse = scale · m + log l
    token_nll    out[0] = scale (m − s[y]) + log l
                 out[1] = log l − log 2 · Σ 2^a a / l                     the entropy, lse − Σ p z
                 out[2] = scale · m     out[3] = log l     out[4] = scale (m − s[y])
    reverse_kl   δ = a − a_t          out[0] = log 2 · Σ 2^a δ / l − log(l / l_t)
                                      out[1] = scale (m − s[y]) + log l

When a tile raises m to m', what was summed is carried over as in `rows/walk.py`, with powers of 2, x = a or x = δ, and
d = c (m − m').

Equal student and teacher give a = a_t and l = l_t, bit for bit, hence a divergence of exactly 0: multiplications and
additions are contracted only where `fma` says so. The rules at the edges are those of `divergence/formula.py` and
`rows/walk.py`, NaN for a token id outside the vocabulary included, with one difference: 2^a is 0 below 2^−126, and a
token with 2^a = 0 is impossible.

Same bits for a row wherever it stands: the vocabulary is cut into at most MAX_SPLITS splits, by V and the launch
configuration alone. A program owns one tile of rows and one split, and leaves K sums per row (2 for token_nll, 3 with
the entropy, 6 for reverse_kl); a second kernel merges the splits of a row, always in the same tree. No atomics, no
locks. The sums and s[y] take 4 n (K · splits + 1) bytes: 8.4 MB for token_nll and 25 MB for reverse_kl at n = 8192, V =
262144.

Schedule. Programs start in the order of their index: all splits of a group of row tiles, then the next group. In a
group the row tiles of one split are neighbours: they want the same piece of the weight at about the same time. The
hidden states of a group, at most GROUP_BYTES, stay in the L2 cache while the weight goes by once per group. At
N, D, V = 8192, 4096, 151936 in bf16 a group is 16 tiles of 128 rows: the weight is read from memory 4 times and the
hidden states once, 5.0 GB, or 1.2 ms of an H200 beside 12.9 ms of multiplication (10.2 TFLOP). A split is a single
software pipeline over its tiles and the steps of D in them, of one head after the other: the operands of the next tile
arrive while the last one is reduced. There are far more programs than multiprocessors (7616 there) and each runs long:
the hardware's queue serves as a persistent loop.

Cost over a plain GEMM at that shape on sm_90, by counting, not measured: reducing a tile of 128 × 256 takes about 3000
cycles beside the 65536 in which the tensor cores make it: 5 %, twice that at D = 2048. The steps read 119 GB from the L2
cache, 9 TB/s at full speed. To tune, in this order: GROUP_BYTES (8 to 32 MiB), num_stages 3 against 4, two programs of
128 × 128 with 4 warps per multiprocessor, and MAX_SPLITS (which changes the bits).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastkl.kernels.launch import (
    LaunchConfig,
    check_device,
    check_rows,
    launch,
    product_config,
    register_limit,
    suits_vectors,
    target_of,
    token_ids,
)
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.score.merge_kernels import merge_reverse_kl_kernel, merge_token_nll_kernel
from fastkl.kernels.score.tile_kernels import reverse_kl_kernel, token_nll_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the operands; accumulators are float32
MAX_SPLITS = 128  # of the vocabulary
GROUP_BYTES = 16 * 2**20  # of hidden states that stay in the L2 cache while the weight goes by
MERGE = LaunchConfig(block_m=16)  # of a program that merges splits

# How operands are read: by tensor descriptors (TMA), by pointers 16 bytes at a time, or one element at a time. It follows
# from D and the distance of rows, as long as tensors start at multiples of 16 bytes.
Access = Literal["descriptors", "vectors", "scalars"]


class Head(NamedTuple):
    """Hidden states and what they are projected with."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D], dtype of the hidden states
    bias: Tensor | None  # [V]
    options: HeadOptions


def token_nll(head: Head, tokens: Tensor, out: Tensor, entropy: bool = False) -> None:
    """out[0] = lse(z) − z[y]; with `entropy` also out[1] = lse(z) − Σ p z, out[2] = max z, out[3] = lse(z) − max z,
    out[4] = max z − z[y].
    """
    check_head(head)
    scale = {"scale": scale_of(head)}
    sums = 3 if entropy else 2
    _score(token_nll_kernel, merge_token_nll_kernel, [head], tokens, out, sums, scale, ENTROPY=entropy)


def reverse_kl(student: Head, teacher: Head, tokens: Tensor | None, out: Tensor) -> None:
    """out[0] = Σ p (log p − log q); out[1] = −log p[y], 0 without tokens."""
    check_head(student)
    check_head(teacher)
    shape, shape_t = ((head.hidden.shape[0], head.weight.shape[0]) for head in (student, teacher))
    if shape != shape_t:
        raise ValueError(
            f"student and teacher must have the same rows and vocabulary: {shape[0]} and {shape[1]} for the student, "
            f"{shape_t[0]} and {shape_t[1]} for the teacher"
        )
    if student.hidden.dtype != teacher.hidden.dtype:
        raise TypeError(
            f"student and teacher must have one dtype: {student.hidden.dtype} for the student, {teacher.hidden.dtype} for "
            f"the teacher"
        )
    scales = {"scale": scale_of(student), "scale_t": scale_of(teacher)}
    _score(reverse_kl_kernel, merge_reverse_kl_kernel, [student, teacher], tokens, out, 6, scales)


def _score(
    kernel: Any,
    merge_kernel: Any,
    heads: list[Head],
    tokens: Tensor | None,
    out: Tensor,
    sums: int,
    scales: dict[str, float],
    **constants: bool,
) -> None:
    """`kernel` leaves `sums` numbers per row and split, `merge_kernel` makes the values of them."""
    (n, _), vocabulary, device = heads[0].hidden.shape, heads[0].weight.shape[0], out.device
    if n == 0:
        return
    access, config = plan(heads)
    count, width = splits(vocabulary, config.block_n)
    common = {
        "partials_ptr": torch.empty(sums, count, n, dtype=torch.float32, device=device),
        "targets_ptr": None if tokens is None else torch.empty(n, dtype=torch.float32, device=device),
        "n": n,
        "vocabulary": vocabulary,
        "splits": count,
        "enable_fp_fusion": False,
        **token_ids(tokens),
        **scales,
        **constants,
    }
    launch(
        kernel,
        (triton.cdiv(n, config.block_m) * count,),
        config,
        device,
        width=width,
        group=group_of(heads, config),
        TMA=access == "descriptors",
        **register_limit(device, config.num_warps, 1),
        **head_arguments(heads[0], access, config),
        **(head_arguments(heads[1], access, config, "_t") if len(heads) > 1 else {}),
        **common,
    )
    launch(
        merge_kernel,
        (triton.cdiv(n, MERGE.block_m),),
        MERGE,
        device,
        out_ptr=out,
        out_stride_value=out.stride(0),
        out_stride_row=out.stride(1),
        SPLITS=triton.next_power_of_2(count),
        **register_limit(device, MERGE.num_warps, 2),
        **common,
    )


def splits(vocabulary: int, block_n: int) -> tuple[int, int]:
    """(splits, columns of each): a function of the vocabulary, and the bits of a row do not depend on n."""
    tiles = triton.cdiv(vocabulary, block_n)
    tiles_each = triton.cdiv(tiles, MAX_SPLITS)
    return triton.cdiv(tiles, tiles_each), tiles_each * block_n


def plan(heads: list[Head], *results: Tensor) -> tuple[Access, LaunchConfig]:
    """How operands are read and `results` written, and the shape of a program: the widest tiles that spill no registers."""
    target = target_of(heads[0].hidden.device)
    arch = target.arch // 10 if target.backend == "cuda" else None
    access = _access([*(t for head in heads for t in (head.hidden, head.weight)), *results], arch)
    dtype = heads[0].hidden.dtype
    config = product_config(target, dtype, vectors=access != "scalars")
    if dtype == torch.float32 or access == "scalars":
        return access, config
    columns = 128 // len(heads)
    if arch == 9 and access == "descriptors" and all(head.bias is None for head in heads):
        columns *= 2  # a bias takes a register for each column
    if arch is None and any(head.options.cap is not None for head in heads):
        columns = 64
    stages = 6 if arch == 10 and access == "descriptors" else config.num_stages
    return access, config._replace(block_n=columns, num_stages=stages)


def _access(operands: list[Tensor], arch: int | None) -> Access:
    if arch in (9, 10) and all(map(_suits_descriptors, operands)):
        return "descriptors"
    return "vectors" if all(map(suits_vectors, operands)) else "scalars"


def _suits_descriptors(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1] > 0


def head_arguments(head: Head, access: Access, config: LaunchConfig, suffix: str = "") -> dict[str, Any]:
    """A head as arguments of a kernel that multiplies."""
    hidden, weight = head.hidden, head.weight
    dim = hidden.shape[1]
    tensors = access != "descriptors"
    return {
        f"h{suffix}": hidden if tensors else descriptor(hidden, config.block_m, config.block_k),
        f"w{suffix}": weight if tensors else descriptor(weight, config.block_n, config.block_k),
        f"bias{suffix}_ptr": head.bias,
        f"alpha{suffix}": head.options.alpha,
        f"dim{suffix}": dim,
        f"h{suffix}_stride_row": hidden.stride(0),
        f"w{suffix}_stride_row": weight.stride(0),
        f"CAPPED{suffix.upper()}": head.options.cap is not None,
        f"EVEN_K{suffix.upper()}": dim % config.block_k == 0,
    }


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, columns])


def scale_of(head: Head) -> float:
    return head.options.alpha if head.options.cap is None else head.options.cap


def group_of(heads: list[Head], config: LaunchConfig) -> int:
    """Row tiles of a group."""
    row_bytes = sum(head.hidden.shape[1] * head.hidden.itemsize for head in heads)
    return max(1, GROUP_BYTES // max(1, config.block_m * row_bytes))


def check_head(head: Head) -> None:
    hidden, weight = head.hidden, head.weight
    check_device("hidden states are", hidden)
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            "the Triton scoring kernels take hidden states and weight of one dtype, bfloat16, float16 or float32, "
            f"not {hidden.dtype} and {weight.dtype}"
        )
    if hidden.shape[1] == 0:
        raise ValueError('the Triton scoring kernels need a hidden size of at least 1, not 0: pass backend="torch"')
    check_rows("hidden states", hidden)
    check_rows("weight", weight)
