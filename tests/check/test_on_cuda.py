"""What the checks do on a GPU, without one: which kernels they launch, and that these can be compiled in advance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from all_kernels import kernels
from fake_cuda import Machine
from triton.runtime.jit import JITFunction

from bench.variants.aot import kernel_name
from bench.variants.fake_cuda import fake_tensors
from fastkl._check import compiling
from fastkl._check.errors import Check
from fastkl._check.kernels import checks
from fastkl._check.problem import SIZES, make_problem

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: names.append(kernel_name(self)))
    Machine(monkeypatch, 90)
    return names


def all_checks(dtype: torch.dtype) -> Iterator[Check]:
    yield from checks(make_problem(SIZES["cuda"]), dtype, "cuda", "triton")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_kernel_is_checked(dtype: torch.dtype, launched: list[str]) -> None:
    with fake_tensors():
        for check in all_checks(dtype):
            check.run()
    assert {*launched} == {kernel_name(kernel) for kernel in kernels()}


def test_of_float32_all_but_what_multiplies_16_bits_are(launched: list[str]) -> None:
    with fake_tensors():
        for check in all_checks(torch.float32):
            check.run()
    assert {*launched} == {
        name for kernel in kernels() if not (name := kernel_name(kernel)).startswith(("score.", "epilogue."))
    }


def test_compiling_goes_on_after_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run; a kernel that several calls ask for counts once."""
    ran: list[bool] = []

    class Kernel:
        src = metadata = None

    one = Kernel()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        ran.append(not warmup)
        if options.get("wrong"):
            raise ValueError("cannot be compiled")
        return one

    monkeypatch.setattr(JITFunction, "run", run)
    kernel = next(kernels())
    found = compiling.compile_launches(
        [lambda: kernel[(1,)](wrong=True), lambda: kernel[(1,)](), lambda: 1 / 0, lambda: kernel[(1,)]()], workers=2
    )
    assert found == 1
    assert ran == [False] * 3
