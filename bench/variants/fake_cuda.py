"""Tensors that say they are on a CUDA device and have no memory: what the host does for a GPU, run on a CPU."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CUDA, META = 1, 14  # c10::DeviceType


@contextmanager
def fake_tensors() -> Iterator[None]:
    """New tensors have no memory, but an address, which is a multiple of 512 as on a GPU."""
    addresses: dict[int, int] = {}
    fresh = itertools.count(2**40, 2**36)

    def data_ptr(self: FakeTensor) -> int:
        storage = self.untyped_storage()
        start = addresses.setdefault(storage._cdata, next(fresh))
        return start + int(self.storage_offset()) * self.itemsize

    with mock.patch.object(FakeTensor, "data_ptr", data_ptr), _device_guard(), FakeTensorMode():
        yield


@contextmanager
def _device_guard() -> Iterator[None]:
    """A torch without CUDA cannot slice what says it is there. It is given the guard of meta tensors, which does nothing.

    A torch with CUDA and without a GPU does this itself (torch._C._ensureCUDADeviceGuardSet).
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    own = guards[CUDA]
    guards[CUDA] = own or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = own
