"""Tensors that say they are on a CUDA device and have no memory: what the host does for a GPU, run on a CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget


class Machine:
    """GPUs of one generation or several, as torch's device guard and Triton's driver have them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *archs: int) -> None:
        self.archs, self.current = archs, 0
        monkeypatch.setattr(triton.runtime.driver, "_active", self)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index or 0
        try:
            yield
        finally:
            self.current = before

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.archs[self.current], 32)


@contextmanager
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors have no memory, but an address, which is a multiple of 512 as on a GPU."""
    addresses: dict[int, int] = {}
    fresh = itertools.count(2**40, 2**36)

    def data_ptr(self: FakeTensor) -> int:
        storage = self.untyped_storage()
        start = addresses.setdefault(storage._cdata, next(fresh))
        return start + int(self.storage_offset()) * self.itemsize

    monkeypatch.setattr(FakeTensor, "data_ptr", data_ptr, raising=False)
    with FakeTensorMode():
        yield
