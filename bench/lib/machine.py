"""What a number was measured on: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def describe_machine(device: str) -> dict[str, str | int | float]:
    """CPU model, cores, threads and memory; on CUDA the GPU's name and memory too."""
    machine: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1)}
    return machine


def describe_versions(*packages: str) -> dict[str, str | None]:
    """Python, torch (with its CUDA), triton and fastkl, and `packages`; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {package: _version(package) for package in ("triton", "fastkl", *packages)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
