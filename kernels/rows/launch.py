"""How row kernels are launched: one program per row of a chunk of logits.

One program per row fills a GPU from about two rows per multiprocessor on; the driver's chunks have 1024 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import triton
from torch import Tensor

from fastkl.kernels.launch import LaunchConfig, check_device, check_rows, launch, register_limit
from fastkl.kernels.rows.interface import Logits

DTYPES = (torch.float32, torch.bfloat16)  # of a chunk; arithmetic is float32
GRADIENT_DTYPES = (*DTYPES, torch.float16)

CHUNKS = ("x", "x_t", "u")  # how the parameters of a row kernel that say where a chunk lies begin


def row_kernel(function: Callable[..., None]) -> Any:
    """Declares a row kernel. Where a chunk lies is alike from call to call; its other pointers and strides vary.

    So does the vocabulary, of which nothing depends: an odd one has the kernel of an even one where rows lie as far apart.
    """
    names = [name for name in signature(function).parameters if not name.startswith(tuple(f"{c}_" for c in CHUNKS))]
    return triton.jit(
        function,
        do_not_specialize=["vocabulary", *[name for name in names if "_stride" in name]],
        do_not_specialize_on_alignment=[name for name in names if name.endswith("_ptr")],
    )


def row_config(chunks: int) -> LaunchConfig:
    """The shape of a program that reads rows of `chunks` chunks: 1, or 2 with a teacher.

    The last block alone may be partly empty. A thread (of warps of 32) has 8 logits, 32 bytes, in flight, shared between
    the chunks. With more, some variant spills; with these most need no more than 64 registers, so that two programs or more
    share a multiprocessor and one loads while another waits at a reduction.
    """
    num_warps = 16
    return LaunchConfig(block_n=8 * 32 * num_warps // chunks, num_warps=num_warps)


def launch_rows(
    kernel: Any, logits: Logits, *, chunks: int = 1, programs: int | None = None, **arguments: object
) -> None:
    """Runs a row kernel on the student's chunk; `arguments` are its others.

    With `programs` it is compiled to have so many share a multiprocessor.
    """
    x = logits.student
    student = chunk(x, logits.student_cap, logits.student_bias)
    n, vocabulary = x.shape
    if n == 0:
        return
    config = row_config(chunks)
    limit = {} if programs is None else register_limit(x.device, config.num_warps, programs)
    launch(kernel, (n,), config, x.device, vocabulary=vocabulary, **student, **arguments, **limit)


def chunk(x: Tensor, cap: float | None, bias: Tensor | None, suffix: str = "") -> dict[str, Any]:
    """A chunk of logits as arguments of a row kernel."""
    check_device("chunk is", x)
    _check(x, DTYPES)
    return {
        f"x{suffix}_ptr": x,
        f"x{suffix}_bias_ptr": bias,
        f"x{suffix}_stride_row": x.stride(0),
        f"cap{suffix}": 1.0 if cap is None else cap,
        f"CAPPED{suffix.upper()}": cap is not None,
    }


def written_to(gradient: Tensor | None) -> dict[str, Any]:
    """The gradient's place as arguments of a row kernel: the chunk itself, or apart from it, or none."""
    if gradient is None:
        return {"u_ptr": None, "u_stride_row": 0}
    _check(gradient, GRADIENT_DTYPES)
    return {"u_ptr": gradient, "u_stride_row": gradient.stride(0)}


def _check(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(
            f"the Triton row functions take chunks of {' or '.join(str(d) for d in dtypes)}, not {x.dtype}: pass "
            f'backend="torch" (fastkl.kernels.rows.pytorch)'
        )
    check_rows("chunk of logits", x)
