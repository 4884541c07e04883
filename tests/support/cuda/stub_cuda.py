"""A libcuda.so.1 without a device, in front of which Triton's own driver and launcher run on a CPU.

`stub_cuda.c` is built with the C compiler that Triton needs itself. It hands every call to `StubCuda`, which refuses what a
device would refuse, and writes down the rest.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from fake_cuda import PROCESSORS

SUCCESS, INVALID_VALUE, NO_BINARY_FOR_GPU, UNKNOWN = 0, 1, 209, 999
MAP_BYTES, SMALL_SHARED_MEMORY, REGISTERS = 128, 48 * 1024, 65536
MAP_ITEMS = {6: 2, 7: 4, 9: 2}  # bytes of a number: float16, float32, bfloat16
SWIZZLES = {0: 256 * 16, 1: 32, 2: 64, 3: 128}  # bytes that the inner side of a box may have


class Function:
    """A kernel as a driver finds it in a binary."""

    def __init__(self, elf: bytes, name: str) -> None:
        own = {section: content for section, content in sections(elf) if section.startswith(".nv.info")}
        self.name = name
        self.sizes = [size for _, size in sorted(parameter_sizes(own[f".nv.info.{name}"]))]
        self.registers = register_count(own[".nv.info"])
        self.shared_memory = SMALL_SHARED_MEMORY  # what a launch may ask for


class Launch(NamedTuple):
    function: Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    stream: int
    attributes: int
    parameters: list[bytes]


class TensorMap(NamedTuple):
    """Lengths of the inner side first."""

    type: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all sides but the inner one
    box: tuple[int, ...]
    swizzle: int
    content: bytes  # what the kernel is to be given


class StubCuda:
    """What the functions of the driver are told; devices are of the generations `archs`."""

    def __init__(self, archs: tuple[int, ...]) -> None:
        self.archs = archs
        self.context = 0
        self.modules: list[bytes] = []
        self.functions: list[Function] = []
        self.launches: list[Launch] = []
        self.maps: list[TensorMap] = []
        self.errors: list[BaseException] = []
        self.listener = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))(self.listen)

    def listen(self, name: bytes, arguments: Any) -> int:
        try:
            code: int = getattr(self, name.decode())(arguments)
        except BaseException as error:  # it cannot pass through C
            self.errors.append(error)
            return UNKNOWN
        if code != SUCCESS:
            self.errors.append(ValueError(f"{name.decode()} was refused"))
        return code

    def cuDriverGetVersion(self, a: Any) -> int:
        return write(a[0], ctypes.c_int, 13020)

    def cuDeviceGet(self, a: Any) -> int:
        return write(a[0], ctypes.c_int, a[1])

    def cuDeviceGetAttribute(self, a: Any) -> int:
        most = {80: 163, 90: 227}[self.archs[a[2]]] * 1024
        known = {97: most, 81: most + 1024, 12: REGISTERS, 16: PROCESSORS, 10: 32, 13: 1, 36: 1, 37: 1}
        return write(a[0], ctypes.c_int, known[a[1]])

    def cuDevicePrimaryCtxRetain(self, a: Any) -> int:
        return write(a[0], ctypes.c_uint64, 1 + a[1])

    def cuCtxGetCurrent(self, a: Any) -> int:
        return write(a[0], ctypes.c_uint64, self.context)

    def cuCtxSetCurrent(self, a: Any) -> int:
        self.context = a[0]
        return SUCCESS

    def cuModuleLoadData(self, a: Any) -> int:
        """A binary must be of the generation of the current device."""
        elf = read_elf(a[1])
        if elf_arch(elf) != self.archs[self.context - 1]:
            return NO_BINARY_FOR_GPU
        self.modules.append(elf)
        return write(a[0], ctypes.c_uint64, len(self.modules))

    def cuModuleGetFunction(self, a: Any) -> int:
        self.functions.append(Function(self.modules[a[1] - 1], ctypes.string_at(a[2]).decode()))
        return write(a[0], ctypes.c_uint64, len(self.functions))

    def cuFuncGetAttribute(self, a: Any) -> int:
        """Threads per block, shared memory, local memory, registers."""
        registers = -(-self.functions[a[2] - 1].registers // 8) * 8
        threads = min(1024, REGISTERS // (registers * 32) * 32)
        return write(a[0], ctypes.c_int, {0: threads, 1: 0, 3: 0, 4: registers}[a[1]])

    def cuFuncSetAttribute(self, a: Any) -> int:
        """The dynamic shared memory that a launch may ask for, within that of the device."""
        most = {80: 163, 90: 227}[self.archs[self.context - 1]] * 1024
        if a[1] != 8 or a[2] > most:
            return INVALID_VALUE
        self.functions[a[0] - 1].shared_memory = a[2]
        return SUCCESS

    def cuFuncSetCacheConfig(self, a: Any) -> int:
        return SUCCESS

    def cuPointerGetAttribute(self, a: Any) -> int:
        return write(a[0], ctypes.c_uint64, a[2]) if a[1] == 3 else INVALID_VALUE

    def cuTensorMapEncodeTiled(self, a: Any) -> int:
        """Refuses what CUDA's documentation of this function refuses."""
        rank, item = a[2], MAP_ITEMS[a[1]]
        sizes, strides = read(a[4], ctypes.c_uint64, rank), read(a[5], ctypes.c_uint64, rank - 1)
        box, steps = read(a[6], ctypes.c_uint32, rank), read(a[7], ctypes.c_uint32, rank)
        content = struct.pack("<QQ", len(self.maps), a[3]) * (MAP_BYTES // 16)
        self.maps.append(TensorMap(a[1], a[3], sizes, strides, box, a[9], content))
        ctypes.memmove(a[0], content, MAP_BYTES)
        right = (
            a[0] % 64 == 0
            and a[3] % 16 == 0
            and all(0 < size <= 2**32 for size in sizes)
            and all(stride % 16 == 0 and stride < 2**40 for stride in strides)
            and strides[0] >= sizes[0] * item
            and all(0 < side <= 256 for side in box)
            and box[0] * item % 16 == 0
            and box[0] * item <= SWIZZLES[a[9]]
            and set(steps) == {1}
            and a[8] == 0
        )
        return SUCCESS if right else INVALID_VALUE

    def cuLaunchKernelEx(self, a: Any) -> int:
        function = self.functions[a[0] - 1]
        pointers = read(a[1], ctypes.c_uint64, len(function.sizes))
        parameters = [ctypes.string_at(p, size) for p, size in zip(pointers, function.sizes, strict=True)]
        grid, block = tuple(a[i] for i in (3, 4, 5)), tuple(a[i] for i in (6, 7, 8))
        self.launches.append(Launch(function, grid, block, a[9], a[10], a[11], parameters))  # type: ignore[arg-type]
        within = 0 < grid[0] < 2**31 and all(0 < side < 2**16 for side in grid[1:])
        return SUCCESS if within and a[9] <= function.shared_memory and a[2] == 0 else INVALID_VALUE


def compiler() -> str | None:
    """The compiler that Triton would take, where it can build an extension of Python."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) if headers.exists() else None


def load_stub(folder: Path) -> ctypes.CDLL:
    """Builds the library in `folder` and loads it. Who then asks for libcuda.so.1, by that name, gets it."""
    file, headers = folder / "libcuda.so.1", Path(triton.__file__).parent / "backends/nvidia/include"
    source = Path(__file__).with_name("stub_cuda.c")
    command = [compiler(), "-shared", "-fPIC", f"-Wl,-soname,{file.name}", "-I", headers, source, "-o", file]
    subprocess.run(command, check=True)  # type: ignore[arg-type]
    return ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def use_driver(patch: pytest.MonkeyPatch, archs: tuple[int, ...], current: Callable[[], int], stream: int) -> None:
    """Triton's driver for CUDA, in front of the stub; device i has the stream `stream` + i."""
    from triton.backends.nvidia.driver import CudaDriver, libcuda_dirs, library_dirs

    for cached in (libcuda_dirs, library_dirs):
        cached.cache_clear()
    driver = CudaDriver()
    patch.setattr(driver, "get_current_device", current)
    patch.setattr(driver, "get_device_capability", lambda index: divmod(archs[index], 10))
    patch.setattr(driver, "get_current_stream", lambda index: stream + index)
    patch.setattr(triton.runtime.driver, "_active", driver)


def write(address: int, kind: Any, value: int) -> int:
    ctypes.cast(address, ctypes.POINTER(kind))[0] = value
    return SUCCESS


def read(address: int, kind: Any, count: int) -> tuple[int, ...]:
    return tuple(ctypes.cast(address, ctypes.POINTER(kind))[:count])


def read_elf(address: int) -> bytes:
    table, size, count = struct.unpack_from("<Q10xHH", ctypes.string_at(address, 64), 0x28)
    headers = ctypes.string_at(address + table, size * count)
    ends = [sum(struct.unpack_from("<24xQQ", headers, index * size)) for index in range(count)]
    return ctypes.string_at(address, max(*ends, table + size * count))


def elf_arch(elf: bytes) -> int:
    return elf[0x30]


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the sections of a 64-bit ELF file."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", elf, 0x28)
    rows = [struct.unpack_from("<I20xQQ", elf, table + index * size) for index in range(count)]
    strings = rows[names][1]
    for name, start, length in rows:
        end = elf.index(b"\0", strings + name)
        yield elf[strings + name : end].decode(), elf[start : start + length]


def attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Of a section .nv.info: format, kind, then a length and as many bytes, or two bytes."""
    place = 0
    while place < len(info):
        form, kind, length = struct.unpack_from("<BBH", info, place)
        place += 4
        content = info[place : place + length] if form == 4 else b""
        place += len(content)
        yield kind, content


def parameter_sizes(info: bytes) -> Iterator[tuple[int, int]]:
    """Ordinal and bytes of each parameter of a kernel."""
    for kind, content in attributes(info):
        if kind == 0x17:  # EIATTR_KPARAM_INFO
            ordinal, flags = struct.unpack_from("<4xH2xI", content)
            yield ordinal, flags >> 18


def register_count(info: bytes) -> int:
    """Of the one kernel of a binary."""
    return max(struct.unpack_from("<4xI", content)[0] for kind, content in attributes(info) if kind == 0x2F)
