"""Triton kernels compiled ahead of time, for GPUs that are not there.

The launcher itself is what is called; only Triton's driver is replaced, by one that names a chip, and every launch is a
warm-up, which compiles and does not run.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastkl.kernels import launch


class Chip(NamedTuple):
    target: GPUTarget
    shared_memory: int  # bytes that one program may have; of sm_80 what its smaller relatives, sm_86 and sm_89, have


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 99 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# Tensor-core instructions by the text that gives them away in the assembly, the most telling one first.
INSTRUCTIONS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma", "v_mfma": "mfma"}


class Compiled(NamedTuple):
    """What one launch of a kernel was compiled to."""

    name: str  # folder and function: rows.token_nll
    kernel: Any  # triton's CompiledKernel


class Resources(NamedTuple):
    """What a compiled kernel takes of a chip."""

    registers: int  # per thread; vector registers on a gfx chip
    spill_bytes: int  # local memory per thread, a stack included
    shared_bytes: int  # per program
    load_bytes: int | None  # the widest access of a thread to global memory, by its address; None on a gfx chip
    store_bytes: int | None
    tensor_core: str | None  # the family of its matrix instructions
    code_bytes: int


Compile = Callable[[str, Callable[[], object]], list[Compiled]]


@contextmanager
def compiler() -> Iterator[Compile]:
    """A function (chip, call) -> the kernels that `call()` would run on that chip, in order.

    `call` has tensors on a CPU, which the launchers refuse otherwise. A variant is compiled once, as by Triton.
    """
    seen: list[Compiled] = []
    launched: set[JITFunction[Any]] = set()
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.add(self)
        seen.append(Compiled(kernel_name(self), original(self, *args, grid=grid, warmup=True, **options)))

    def compile_launch(chip: str, call: Callable[[], object]) -> list[Compiled]:
        seen.clear()
        with mock.patch.object(triton.runtime.driver, "_active", ChipDriver(chip)):
            call()
        return list(seen)

    with ExitStack() as patches:
        patches.callback(lambda: [function.device_caches.clear() for function in launched])
        patches.enter_context(mock.patch.object(JITFunction, "run", warm_up))
        patches.enter_context(mock.patch.object(launch, "runs_triton", return_value=True))
        yield compile_launch


class ChipDriver:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.chip].target

    def get_current_device(self) -> str:
        return f"{self.chip}, compiled ahead of time"  # the key of the cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


def kernel_name(function: Any) -> str:
    """folder.function, as `Compiled.name`."""
    folder = function.__module__.split(".")[-2]
    return f"{folder}.{function.__name__.removeprefix('_').removesuffix('_kernel')}"


def resources(kernel: Any) -> Resources:
    if "cubin" in kernel.asm:
        usage = _usage_of_cubin(kernel.asm["cubin"])
        registers, spill = usage["REG"], usage["STACK"] + usage["LOCAL"]
        assembly, binary = kernel.asm["ptx"], kernel.asm["cubin"]
    else:
        assembly, binary = kernel.asm["amdgcn"], kernel.asm["hsaco"]
        usage = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", assembly)}
        registers, spill = usage["vgpr_count"], usage["private_segment_fixed_size"]
    family = next((name for text, name in INSTRUCTIONS.items() if text in assembly), None)
    load, store = (widest_access(kernel.asm.get("ptx"), kind) for kind in ("ld", "st"))
    return Resources(registers, spill, kernel.metadata.shared, load, store, family, code_bytes(binary))


def widest_access(ptx: str | None, kind: str) -> int | None:
    """Bytes; 0 if there is none."""
    if ptx is None:
        return None
    found = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def _usage_of_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def code_bytes(elf: bytes) -> int:
    """Size of the .text sections of a 64-bit ELF file."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    sections = [struct.unpack_from("<I20xQQ", elf, table + index * size) for index in range(count)]
    strings = sections[names][1]
    return sum(length for name, _, length in sections if elf.startswith(b".text", strings + name))
