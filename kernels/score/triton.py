"""Values straight from hidden states and the weight of the LM head, in Triton: no logits in memory.

Here are the formulas, the schedule and the launches; the kernels are in `score_kernels_triton.py`.

A program multiplies a tile of rows with one tile of the vocabulary after the other and reduces each product while it is
in registers. The score of a token is kept as s = h·w + b, or tanh(alpha (h·w + b)) where the head has a soft-cap, so
that z = scale · s with scale = alpha > 0, or cap. With m the largest s so far, in units of log 2 (c = scale · log₂ e),
and, with subscript t, for the teacher:

    a = c (s − m)                     l = Σ 2^a         p = 2^a / l       lse = scale · m + log l
    token_nll    out[0] = scale (m − s[y]) + log l
                 out[1] = log l − log 2 · Σ 2^a a / l                     the entropy, lse − Σ p z
    reverse_kl   δ = a − a_t          out[0] = log 2 · Σ 2^a δ / l − log(l / l_t)
                                      out[1] = scale (m − s[y]) + log l

When a tile raises m to m', what was summed is carried over as in `triton_common`, with x = a or x = δ:

    l ← 2^d l            Σ 2^a x ← 2^d (Σ 2^a x + l d_x)            d = c (m − m'),   d_x = d or d − d_t

Equal student and teacher give a = a_t and l = l_t, bit for bit, hence a divergence of exactly 0: multiplications and
additions are contracted only where `fma` says so. The rules at the edges are those of `divergence.py` and
`triton_common`, NaN for a token id outside the vocabulary included, with one difference: 2^a is 0 below 2^−126, and a
token with 2^a = 0 is impossible.

Same bits for a row wherever it stands: the vocabulary is cut into at most MAX_SPLITS splits, by V and the launch
configuration alone. A program owns one tile of rows and one split, and leaves K sums per row (2 for token_nll, 3 with
the entropy, 6 for reverse_kl); a second kernel merges the splits of a row, always in the same tree. No atomics, no
locks. The sums and s[y] take 4 n (K · splits + 1) bytes: 8.4 MB for token_nll and 25 MB for reverse_kl at n = 8192, V =
262144.

Schedule. Programs start in the order of their index: all splits of a group of row tiles, then the next group. In a
group the row tiles of one split are neighbours, so that they want the same piece of the weight at about the same time,
and the hidden states of a group, at most GROUP_BYTES, stay in the L2 cache while the weight goes by once per group. At
N, D, V = 8192, 4096, 151936 in bf16 a group is 16 tiles of 128 rows: the weight is read from memory 4 times and the
hidden states once, 5.0 GB, or 1.2 ms of an H200 beside 12.9 ms of multiplication (10.2 TFLOP). A split is a single
software pipeline over its tiles and the steps of D in them (`flatten`): the operands of the next tile arrive while the
last one is reduced. There are far more programs than multiprocessors (7616 there) and each runs long, so the hardware's
queue stands in for a persistent loop.

Cost over a plain GEMM at that shape on sm_90, by counting: reducing a tile of 128 × 256 takes some 1030 instructions
per warp, about 3000 cycles beside the 65536 in which the tensor cores make it: 5 %, twice that at D = 2048. They idle
meanwhile. Starting and filling a program is about 1 % of its 5 tiles, and the last wave of programs leaves 0.5 % empty.
Nothing of the 2.5 GB that a GEMM writes in bf16 is written. That leaves 8 % for the multiplication itself if the whole
is to stay within 1.15 of the vendor's. Its steps read 119 GB from the L2 cache at that shape, 9 TB/s at full speed;
vendor kernels share tiles between neighbouring multiprocessors, which Triton does not, so this is what may cost it. No
figure here is measured. To tune on an H200, in this order: GROUP_BYTES (8 to 32 MiB), num_stages 3 against 4, two
programs of 128 × 128 with 4 warps per multiprocessor, one of which multiplies while the other reduces, and MAX_SPLITS
(which changes the bits).

float32 operands are multiplied without tensor cores, exactly as float32: right but slow, vendor GEMMs are the better
choice.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.rows.launch import check_device, current_target, launch_on
from fastkl.kernels.score.triton_kernels import (
    merge_reverse_kl_kernel,
    merge_token_nll_kernel,
    reverse_kl_kernel,
    token_nll_kernel,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the operands; accumulators are float32
MAX_SPLITS = 128  # of the vocabulary
GROUP_BYTES = 16 * 2**20  # of hidden states that stay in the L2 cache while the weight goes by
MERGED_ROWS = 16  # rows of a program that merges splits

# How operands are read: by tensor descriptors (TMA), by pointers 16 bytes at a time, or one element at a time. It follows
# from D and the distance of rows, as long as tensors start at multiples of 16 bytes.
Access = Literal["descriptors", "vectors", "scalars"]


class Head(NamedTuple):
    """Hidden states and what they are projected with."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D], dtype of the hidden states
    bias: Tensor | None  # [V]
    options: HeadOptions


class LaunchConfig(NamedTuple):
    block_m: int  # rows of a tile
    block_n: int  # columns of the vocabulary of a tile
    block_k: int  # of D, per step
    num_warps: int
    num_stages: int  # steps whose operands are on their way or in use


def launch_config(
    target: GPUTarget, dtype: torch.dtype, access: Access, heads: int, bias: bool, capped: bool
) -> LaunchConfig:
    """The shape of a program for operands of `dtype`, two `heads` with a teacher.

    A rule, not an autotuner, and blind to n: the order of sums, and with it the bits of a value, must depend neither on
    a timing nor on the batch. Tiles are the widest of which no variant spills registers; a bias takes some for each column.
    """
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 16, 8, 2)
    if access == "scalars":
        return LaunchConfig(64, 64, 32, 8, 1)
    if target.backend == "hip":
        return LaunchConfig(128, 64 if capped or heads == 2 else 128, 64, 8, 2)
    if target.arch // 10 == 10:
        return LaunchConfig(128, 128 // heads, 64, 8, 6 if access == "descriptors" else 4)
    if target.arch // 10 == 9:
        narrow = bias or access == "vectors"
        return LaunchConfig(128, (128 if narrow else 256) // heads, 64, 8, 4)
    return LaunchConfig(128, 128 // heads, 32, 8, 4)


def splits(vocabulary: int, block_n: int) -> tuple[int, int]:
    """(splits, columns of each): a function of the vocabulary, so that the bits of a row do not depend on n."""
    tiles = triton.cdiv(vocabulary, block_n)
    tiles_each = triton.cdiv(tiles, MAX_SPLITS)
    return triton.cdiv(tiles, tiles_each), tiles_each * block_n


def token_nll(head: Head, tokens: Tensor, out: Tensor, entropy: bool = False) -> None:
    """out[0] = lse(z) − z[y]; with `entropy`, out[1] = lse(z) − Σ p z."""
    _check_head(head)
    hidden, weight, bias, options = head
    n, vocabulary = hidden.shape[0], weight.shape[0]
    if n == 0:
        return
    access, config = _plan([head])
    count, width = splits(vocabulary, config.block_n)
    partials = torch.empty(3 if entropy else 2, count, n, dtype=torch.float32, device=hidden.device)
    targets = torch.empty(n, dtype=torch.float32, device=hidden.device)
    capped, alpha, scale = _scales(options)
    with launch_on(hidden):
        token_nll_kernel[_grid(n, count, config)](
            # data
            *_operands(head, access, config),
            bias,
            tokens,
            partials,
            targets,
            alpha,
            scale,
            # shapes
            n,
            vocabulary,
            hidden.shape[1],
            count,
            width,
            _group([head], config),
            # strides
            hidden.stride(0),
            weight.stride(0),
            tokens.stride(0),
            # constants
            CAPPED=capped,
            ENTROPY=entropy,
            EVEN_K=hidden.shape[1] % config.block_k == 0,
            TMA=access == "descriptors",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        merge_token_nll_kernel[(triton.cdiv(n, MERGED_ROWS),)](
            # data
            partials,
            targets,
            tokens,
            out,
            scale,
            # shapes
            n,
            vocabulary,
            count,
            # strides
            tokens.stride(0),
            out.stride(0),
            out.stride(1),
            # constants
            ENTROPY=entropy,
            SPLITS=triton.next_power_of_2(count),
            BLOCK_M=MERGED_ROWS,
            enable_fp_fusion=False,
        )


def reverse_kl(student: Head, teacher: Head, tokens: Tensor | None, out: Tensor) -> None:
    """out[0] = Σ p (log p − log q); out[1] = −log p[y], 0 without tokens."""
    _check_head(student)
    _check_head(teacher)
    hidden, hidden_t = student.hidden, teacher.hidden
    n, vocabulary = hidden.shape[0], student.weight.shape[0]
    if (hidden_t.shape[0], teacher.weight.shape[0]) != (n, vocabulary):
        raise ValueError(
            f"student and teacher must have the same rows and vocabulary: {n} and {vocabulary} for the student, "
            f"{hidden_t.shape[0]} and {teacher.weight.shape[0]} for the teacher"
        )
    if n == 0:
        return
    access, config = _plan([student, teacher])
    count, width = splits(vocabulary, config.block_n)
    partials = torch.empty(6, count, n, dtype=torch.float32, device=hidden.device)
    targets = None if tokens is None else torch.empty(n, dtype=torch.float32, device=hidden.device)
    capped, alpha, scale = _scales(student.options)
    capped_t, alpha_t, scale_t = _scales(teacher.options)
    with launch_on(hidden):
        reverse_kl_kernel[_grid(n, count, config)](
            # data
            *_operands(student, access, config),
            student.bias,
            *_operands(teacher, access, config),
            teacher.bias,
            tokens,
            partials,
            targets,
            alpha,
            scale,
            alpha_t,
            scale_t,
            # shapes
            n,
            vocabulary,
            hidden.shape[1],
            hidden_t.shape[1],
            count,
            width,
            _group([student, teacher], config),
            # strides
            hidden.stride(0),
            student.weight.stride(0),
            hidden_t.stride(0),
            teacher.weight.stride(0),
            0 if tokens is None else tokens.stride(0),
            # constants
            CAPPED=capped,
            CAPPED_T=capped_t,
            EVEN_K=hidden.shape[1] % config.block_k == 0,
            EVEN_K_T=hidden_t.shape[1] % config.block_k == 0,
            TMA=access == "descriptors",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=False,
        )
        merge_reverse_kl_kernel[(triton.cdiv(n, MERGED_ROWS),)](
            # data
            partials,
            targets,
            tokens,
            out,
            scale,
            scale_t,
            # shapes
            n,
            vocabulary,
            count,
            # strides
            0 if tokens is None else tokens.stride(0),
            out.stride(0),
            out.stride(1),
            # constants
            SPLITS=triton.next_power_of_2(count),
            BLOCK_M=MERGED_ROWS,
            enable_fp_fusion=False,
        )


def _plan(heads: list[Head]) -> tuple[Access, LaunchConfig]:
    target = current_target()
    operands = [t for head in heads for t in (head.hidden, head.weight)]
    access: Access = "scalars"
    if target.backend == "cuda" and target.arch // 10 in (9, 10) and all(map(_suits_descriptors, operands)):
        access = "descriptors"
    elif all(map(_suits_vectors, operands)):
        access = "vectors"
    dtype = torch.float32 if torch.float32 in [t.dtype for t in operands] else operands[0].dtype
    bias = any(head.bias is not None for head in heads)
    capped = any(head.options.cap is not None for head in heads)
    return access, launch_config(target, dtype, access, len(heads), bias, capped)


def _suits_descriptors(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 and t.stride(0) >= t.shape[1] > 0


def _suits_vectors(t: Tensor) -> bool:
    """Triton sees the alignment of a number of elements from 16 on."""
    return t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0


def _operands(
    head: Head, access: Access, config: LaunchConfig
) -> tuple[Tensor, Tensor] | tuple[TensorDescriptor, TensorDescriptor]:
    hidden, weight = head.hidden, head.weight
    if access != "descriptors":
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
    )


def _grid(n: int, splits: int, config: LaunchConfig) -> tuple[int]:
    return (triton.cdiv(n, config.block_m) * splits,)


def _group(heads: list[Head], config: LaunchConfig) -> int:
    """Row tiles of a group."""
    row_bytes = sum(head.hidden.shape[1] * head.hidden.itemsize for head in heads)
    return max(1, GROUP_BYTES // max(1, config.block_m * row_bytes))


def _scales(options: HeadOptions) -> tuple[bool, float, float]:
    """Whether there is a cap, alpha, and scale."""
    return options.cap is not None, options.alpha, options.alpha if options.cap is None else options.cap


def _check_head(head: Head) -> None:
    hidden, weight = head.hidden, head.weight
    check_device("hidden states are", hidden)
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise TypeError(
            "the Triton scoring kernels take hidden states and weight of one dtype, bfloat16, float16 or float32, "
            f"not {hidden.dtype} and {weight.dtype}"
        )
    for name, t in (("hidden states", hidden), ("weight", weight)):
        if t.stride(1) != 1 and t.shape[1] > 1:
            raise ValueError(f"the elements of a row of the {name} must lie side by side; the strides are {t.stride()}")
