"""GPUs that are not there, for tensors of `bench.variants.fake_cuda`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

PROCESSORS = 132


class Machine:
    """GPUs of one generation or several, as torch's device guard and Triton's driver have them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *archs: int) -> None:
        self.archs, self.current = archs, 0
        monkeypatch.setattr(triton.runtime.driver, "_active", self)
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=PROCESSORS)
        )

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index or 0
        try:
            yield
        finally:
            self.current = before

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.archs[self.current], 32)
