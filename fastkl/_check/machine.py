"""What the checks run on: versions, the device, and which backend will be used there."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from fastkl._extras import install_command
from fastkl.kernels.problem import Backend

TRAINER = ("transformers", "accelerate", "peft")


class Choice(NamedTuple):
    """The backend that "auto" stands for."""

    backend: Backend
    reason: str


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python, torch, and distributions: None for one that is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    return found | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Of the host; 0 where nothing says it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def describe_device(device: str) -> str:
    if device == "cpu":
        return f"cpu: {cpu_model()}, {torch.get_num_threads()} threads, {memory_bytes() / 2**30:.0f} GiB"
    gpu = torch.cuda.get_device_properties(0)
    free = torch.cuda.mem_get_info(0)[0]
    chip = f"sm_{gpu.major}{gpu.minor}" if torch.version.hip is None else gpu.gcnArchName.partition(":")[0]
    return f"cuda: {gpu.name} ({chip}), {free / 2**30:.0f} of {gpu.total_memory / 2**30:.0f} GiB free"


def choose_backend(device: str) -> Choice:
    if device == "cpu":
        return Choice("torch", "the Triton kernels need a GPU")
    return Choice("triton", "fastkl.loss takes it on every GPU, for all dtypes but float64")


def dtypes(device: str) -> list[torch.dtype]:
    """Those that the device computes in itself."""
    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.float32, *[torch.bfloat16] * has_bf16, torch.float16]


def missing(backend: Backend) -> list[str]:
    """What a backend or the trainer wants and this installation lacks, a line each."""
    lines = []
    if backend == "triton" and (problem := _triton_problem()):
        lines.append(problem)
    absent = [package for package in TRAINER if _version(package) is None]
    if absent:
        lines.append(f"the trainer needs {', '.join(absent)}: {install_command('trainer')} (the losses do not)")
    return lines


def _triton_problem() -> str | None:
    try:
        import fastkl.kernels.launch  # noqa: F401  it refuses a Triton that is too old
    except ImportError as error:
        return f"the losses need triton >= 3.6 here, and it cannot be imported ({error}): pip install 'triton>=3.6'"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "Triton needs a C compiler: install gcc or clang, or set CC"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Triton needs Python.h: install Python's headers (python3-dev)"
    return None
