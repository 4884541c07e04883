"""Where tests run that want a GPU.

Those marked `gpu`: on the GPU; or, where FASTKL_DRY_RUN=1 asks for it, on the CPU with small shapes. A dry run shows that
the tests themselves work. It says nothing of the device. Those of Triton kernels: on the GPU, or in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DRY_RUN = os.environ.get("FASTKL_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
needs_device = pytest.mark.skipif(DRY_RUN, reason="a dry run has no device")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_device() -> str:
    """Where the module that asks runs its kernels. It is skipped where they run nowhere."""
    if INTERPRETED:
        from quick_interpreter import quicken  # imports Triton, which need not be there

        quicken()
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU; test_interpreted.py runs these tests", allow_module_level=True)
    return "cuda"


@contextmanager
def refused_synchronisation() -> Iterator[None]:
    """An operation that makes the host wait raises; in a dry run nothing does."""
    if DRY_RUN:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
