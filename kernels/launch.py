"""How Triton kernels are launched: the shape of their programs, the device, and what is refused. For CUDA and HIP.

Kernels name alike what they have in common: BLOCK_M rows and BLOCK_N columns that a program holds at a time, BLOCK_K of the
inner length of a product. What belongs to a teacher ends in `_t`. A launch passes every argument by its name.

Of what varies from call to call nothing is specialised. Nothing is compiled again for another batch. Widths and the
distances of rows are specialised on being multiples of 16: vectorised loads need that, and it is a property of a model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

if tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(f"triton {triton.__version__} is too old")

REGISTERS = 65536  # of a multiprocessor


class LaunchConfig(NamedTuple):
    """The shape of a program. A length of 1 is none of the kernel's constants.

    It follows from a rule, not from an autotuner, and the rule is blind to the number of rows: the order of sums, and with
    it the bits of a result, must depend neither on a timing nor on the batch.
    """

    block_m: int = 1  # rows
    block_n: int = 1  # columns
    block_k: int = 1  # of the inner length of a product, per step
    num_warps: int = 4
    num_stages: int | None = None  # steps whose operands are on their way or in use; None: Triton's own choice

    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        lengths = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        options = {name: length for name, length in lengths.items() if length > 1} | {"num_warps": self.num_warps}
        return options if self.num_stages is None else options | {"num_stages": self.num_stages}


def product_config(target: GPUTarget, dtype: torch.dtype, vectors: bool) -> LaunchConfig:
    """The shape of a program that multiplies operands of `dtype`, read 16 bytes at a time where there are `vectors`.

    Operands of 16 bits go through tensor cores: wgmma on sm_90, tcgen05 on sm_100, mma and mfma elsewhere. float32 is
    multiplied as float32, without tensor cores on NVIDIA's chips: right, but slower than by a vendor's GEMM.
    """
    if dtype == torch.float32:
        return LaunchConfig(64, 64, 16, num_warps=8, num_stages=2)
    if not vectors:
        return LaunchConfig(64, 64, 32, num_warps=8, num_stages=1)
    if target.backend == "hip":
        return LaunchConfig(128, 128, 64, num_warps=8, num_stages=2)
    return LaunchConfig(128, 128, 64 if target.arch // 10 in (9, 10) else 32, num_warps=8, num_stages=4)


def launch(kernel: Any, grid: tuple[int, ...], config: LaunchConfig, device: torch.device, **arguments: object) -> None:
    """Runs `kernel` on `device`, which need not be the current one. `arguments` are its own and Triton's options."""
    with _current(device):
        kernel[grid](**arguments, **config.options())


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the current one, of which alone Triton's driver speaks."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def token_ids(tokens: Tensor | None) -> dict[str, Any]:
    """As arguments of a launch: [n] or None."""
    return {"tokens_ptr": tokens, "tokens_stride": 0 if tokens is None else tokens.stride(0)}


def register_limit(device: torch.device, num_warps: int, programs: int) -> dict[str, int]:
    """Registers per thread with which `programs` share a multiprocessor of `device`, as an option of Triton's for CUDA.

    Without it the assembler spills now and then to fit one more.
    """
    if triton.knobs.runtime.interpret or target_of(device).backend != "cuda":
        return {}
    return {"maxnreg": REGISTERS // (programs * 32 * num_warps)}


def target_of(device: torch.device) -> GPUTarget:
    """The chip of `device`, which need not be the current one; for Triton's interpreter any will do."""
    if triton.knobs.runtime.interpret:
        return GPUTarget("cuda", 80, 32)
    with _current(device):
        return triton.runtime.driver.active.get_current_target()


def suits_vectors(x: Tensor, width: int | None = None) -> bool:
    """Can rows, or `width` elements of each, be read 16 bytes at a time? Triton sees the alignment of 16 elements."""
    width = x.shape[1] if width is None else width
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and width % 16 == 0


def check_device(what: str, x: Tensor) -> None:
    """Refuses a CPU, but for Triton's interpreter."""
    if not runs_triton(x.device):
        raise ValueError(
            f'the Triton kernels need a CUDA or HIP device and the {what} on {x.device}: pass backend="torch" there'
        )


def runs_triton(device: torch.device) -> bool:
    return device.type == "cuda" or triton.knobs.runtime.interpret


def check_rows(name: str, x: Tensor) -> None:
    """Refuses rows whose elements are apart."""
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"the elements of a row of the {name} must lie side by side; the strides are {x.stride()}")
