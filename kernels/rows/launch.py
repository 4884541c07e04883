"""What the Triton kernels share, the row functions above all: one program per row, for CUDA and HIP devices.

A program walks its row in blocks of BLOCK logits: once to gather everything the values need, and once more, if a gradient
is wanted, to write it, over the row or elsewhere. With m the largest logit, everything is made of a = z − m, so that
e^a ≤ 1, and of l = Σ e^a: written this way logits of any common size cancel before anything is rounded. m is not known
beforehand. When a block raises it from m to m', what was summed is carried over; a term x that moves by d (which is
m − m' for a itself) makes that

    l ← e^(m − m') l                  Σ e^a x ← e^(m − m') (Σ e^a x + d l)

A soft-cap, z = cap · tanh(x), is applied after each load, and dz/dx = (cap − z)(cap + z) / cap before the store.

The rules of `rows_torch` at the edges: a token with z = −inf or p = 0 adds nothing; NaN, +inf and rows of nothing but
−inf end in NaN. Where `rows_torch` hits a device-side assertion, for a token id outside the vocabulary, the row becomes
NaN here.

One program per row fills a GPU from about two rows per multiprocessor on; the driver's chunks have 1024 and more. Sums are
taken per lane and then in a tree, without atomics: the same row gives the same bits, whatever rows surround it.

Of what varies from call to call only the width and the distance of rows are specialised, on being multiples of 16: that is
what vectorised loads need, and it is a property of the model. Nothing is compiled again for another chunk.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"triton {triton.__version__} is too old")

REGISTERS = 65536  # of a multiprocessor
DTYPES = (torch.float32, torch.bfloat16)  # of a chunk; arithmetic is float32
GRADIENT_DTYPES = (*DTYPES, torch.float16)


class LaunchConfig(NamedTuple):
    block: int  # logits of one chunk that a program holds at a time
    num_warps: int


def launch_config(chunks: int) -> LaunchConfig:
    """The shape of a program that reads rows of `chunks` chunks: 1, or 2 with a teacher.

    A rule, not an autotuner: the order of sums, and with it the bits of a loss, must not depend on a timing; nor on the
    width of the rows, of which the last block alone may be partly empty. A thread (of warps of 32) has 8 logits, 32 bytes,
    in flight, shared between the chunks. With more, some variant spills; with these none needs more than 64 registers, so
    that two programs or more share a multiprocessor and one loads while another waits at a reduction.
    """
    num_warps = 16
    return LaunchConfig(8 * 32 * num_warps // chunks, num_warps)


def register_limit(num_warps: int, programs: int) -> dict[str, int]:
    """Registers per thread with which `programs` share a multiprocessor, as an option of Triton's for CUDA.

    Without it the assembler spills now and then to fit one more.
    """
    if triton.knobs.runtime.interpret or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": REGISTERS // (programs * 32 * num_warps)}


def check_chunk(x: Tensor, gradient: Tensor | None = None) -> None:
    """Refuses a chunk of logits, or a place for its gradient, that the row functions cannot work on."""
    check_device("chunk is", x)
    for tensor, dtypes in ((x, DTYPES), (gradient, GRADIENT_DTYPES)):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"the Triton row functions take chunks of {' or '.join(str(d) for d in dtypes)}, not {tensor.dtype}: pass "
                f'backend="torch" (fastkl.kernels.rows.pytorch)'
            )
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"the logits of a row must lie side by side; the chunk has strides {tensor.stride()}")


def check_device(what: str, x: Tensor) -> None:
    """Refuses a CPU, but for Triton's interpreter."""
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f'the Triton kernels need a CUDA or HIP device and the {what} on {x.device}: pass backend="torch" there'
        )


def current_target() -> GPUTarget:
    """The chip that is launched on; for Triton's interpreter any will do."""
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 80, 32)
    return triton.runtime.driver.active.get_current_target()


def launch_on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def load_block(
    x_ptr: tl.tensor, columns: tl.tensor, vocabulary: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr
) -> tl.tensor:
    """The logits z at `columns`; −inf beyond the vocabulary."""
    inside = columns < vocabulary
    z = tl.load(x_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if CAPPED:
        z = tl.where(inside, cap * tanh(z), float("-inf"))
    return z


@triton.jit
def load_one(x_ptr: tl.tensor, y: tl.tensor, vocabulary: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """The logit of token y; NaN if there is no such token."""
    z = tl.load(x_ptr + y, mask=(y >= 0) & (y < vocabulary), other=float("nan")).to(tl.float32)
    if CAPPED:
        z = cap * tanh(z)
    return z


@triton.jit
def store_gradient(
    u_ptr: tl.tensor,
    columns: tl.tensor,
    vocabulary: tl.tensor,
    u: tl.tensor,
    z: tl.tensor,
    cap: tl.tensor,
    CAPPED: tl.constexpr,
) -> None:
    """Stores u · dz/dx at `columns`."""
    if CAPPED:
        u *= (cap - z) * (cap + z) * (1.0 / cap)
    tl.store(u_ptr + columns, u, mask=columns < vocabulary)


@triton.jit
def raise_max(m: tl.tensor, z: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """m' = max(m, max z); what to subtract from logits for it, m'; and m − m'. Both 0 while nothing finite was seen."""
    raised = tl.maximum(m, tl.max(z, 0))
    base = finite_or_zero(raised)
    return raised, base, tl.where(m == float("-inf"), 0.0, m - base)


@triton.jit
def finite_or_zero(m: tl.tensor) -> tl.tensor:
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """Within a few ulp everywhere: a Taylor polynomial where 1 − e^(−2|x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0.0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, far)
