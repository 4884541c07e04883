"""What a number was measured on: the machine and the versions."""

from __future__ import annotations

import os

import torch

from fastkl._check.machine import cpu_model, memory_bytes, versions


def describe_machine(device: str) -> dict[str, str | int | float]:
    """CPU model, cores, threads and memory; on CUDA the GPU's name and memory too."""
    machine: dict[str, str | int | float] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1)}
    return machine


def describe_versions(*packages: str) -> dict[str, str | None]:
    """Python, torch (with its CUDA), triton and fastkl, and `packages`; None for one that is not installed."""
    return versions("triton", "fastkl", *packages)
