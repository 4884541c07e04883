"""What datasheets say of devices. Peaks of dense products, without sparsity; nothing of this was measured here."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import torch

from fastkl.trainer.config.offline import DeviceName

KEPT = 0.95  # of a device's memory is planned with: the rest is for its driver's context and for fragmentation
PRODUCTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "float32", torch.float64: "float64"}


class Device(NamedTuple):
    """A kind of device."""

    title: str
    gigabytes: float  # of memory, 10⁹ bytes
    half: float  # TFLOP/s in bf16 or fp16
    single: float  # TFLOP/s in float32: PyTorch rounds no operand unless it is told to
    bandwidth: float  # TB/s of its memory

    def flops(self, dtype: torch.dtype) -> float:
        """FLOP/s of products in a dtype, at the peak."""
        return (self.half if dtype.itemsize == 2 else self.single) * 1e12


# NVIDIA's datasheets of A100 80GB SXM, H100 SXM, H200 SXM, L40S, DGX B200, GeForce RTX 4090 (Ada whitepaper); AMD's of
# MI300X and MI325X.
DEVICES: dict[DeviceName, Device] = {
    "a100": Device("A100 SXM", 80, 312, 19.5, 2.039),
    "b200": Device("B200", 180, 2250, 75, 8.0),
    "h100": Device("H100 SXM", 80, 989, 67, 3.35),
    "h200": Device("H200 SXM", 141, 989, 67, 4.8),
    "l40s": Device("L40S", 48, 362, 91.6, 0.864),
    "mi300": Device("MI300X", 192, 1307, 163.4, 5.3),
    "mi325": Device("MI325X", 256, 1307, 163.4, 6.0),
    "rtx4090": Device("GeForce RTX 4090", 24, 165, 82.6, 1.008),
}


def room(name: DeviceName, memory: float | None) -> float | None:
    """The bytes that a process may have, where `memory` GiB are not given; None where nothing tells."""
    if memory is not None:
        return memory * 2**30
    if name != "cpu":
        return KEPT * DEVICES[name].gigabytes * 1e9
    return None if sys.platform == "win32" else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
