"""Compiling Triton kernels for GPUs that are not there: the chips, a driver that names one, what a kernel takes of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget


class Chip(NamedTuple):
    target: GPUTarget
    shared_memory: int  # bytes that one program may have


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Driver:
    """As much of Triton's driver as a compilation asks for."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_target(self) -> GPUTarget:
        return CHIPS[self.chip].target

    def get_current_device(self) -> str:
        return f"{self.chip} for tests"  # the key of the cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


class Usage(NamedTuple):
    registers: int  # per thread; vector registers on HIP
    spilled: int  # bytes per thread in local memory, and of a stack
    shared_memory: int  # bytes per program


def usage(kernel: Any, chip: str, folder: Path) -> Usage:
    """What a compiled kernel takes; `folder` is for a temporary file. Scalar registers that HIP moves to vector ones are
    no spills: nothing goes to memory."""
    if CHIPS[chip].target.backend == "hip":
        counts = {k: int(v) for k, v in re.findall(r"\.(\w+):\s+(\d+)\n", kernel.asm["amdgcn"])}
        spilled = counts["private_segment_fixed_size"] + counts["vgpr_spill_count"]
        return Usage(counts["vgpr_count"], spilled, kernel.metadata.shared)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    counts = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Usage(counts["REG"], counts["STACK"] + counts["LOCAL"], kernel.metadata.shared)
