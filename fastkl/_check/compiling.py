"""Triton kernels compiled in advance, several at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock


def compile_launches(calls: Iterable[Callable[[], object]], workers: int | None = None) -> int:
    """Compiles what the calls would launch, which they do not, and returns how many kernels that were.

    A call goes on with what its results' memory happens to hold, and may fail. A kernel that cannot be compiled is left for
    the launch to report. By default there are as many workers as the process has cores.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    kernels: dict[int, Any] = {}
    original = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        kernels.setdefault(id(kernel), kernel)
        return kernel

    with ThreadPoolExecutor(workers or cores()) as pool:
        with mock.patch.object(JITFunction, "run", warm_up), AsyncCompileMode(pool, ignore_errors=True):
            for call in calls:
                with contextlib.suppress(Exception):
                    call()
        list(pool.map(_build_launcher, kernels.values()))
    return len(kernels)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build_launcher(kernel: Any) -> None:
    """Triton 3.6 compiles a C function for each signature, when the kernel is first launched."""
    from triton.runtime import driver

    with contextlib.suppress(Exception):
        compiled = kernel.result() if hasattr(kernel, "result") else kernel
        driver.active.launcher_cls(compiled.src, compiled.metadata)
