"""Products of 16-bit operands that write fp32, as CUDA has them and a CPU has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastkl.kernels import gemm


def into_fp32(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """16-bit heads take the way of CUDA on a CPU. What each product is given, in order."""
    calls: list[dict[str, Any]] = []
    originals = {"mm": torch.mm, "addmm": torch.addmm}

    def mm(first: Tensor, second: Tensor, *dtype: torch.dtype, **options: Any) -> Tensor:
        if not dtype:
            return originals["mm"](first, second, **options)
        assert first.dtype == second.dtype
        calls.append({"operands": (first, second), "out_dtype": dtype[0], **options})
        return originals["mm"](first.to(dtype[0]), second.to(dtype[0]), **options)

    def addmm(self: Tensor, first: Tensor, second: Tensor, *dtype: torch.dtype, **options: Any) -> Tensor:
        if not dtype:
            return originals["addmm"](self, first, second, **options)
        assert first.dtype == second.dtype
        assert self.dtype == dtype[0]
        calls.append({"self": self, "operands": (first, second), "out_dtype": dtype[0], **options})
        return originals["addmm"](self, first.to(dtype[0]), second.to(dtype[0]), **options)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "_writes_fp32", lambda operand: operand.dtype in (torch.bfloat16, torch.float16))
    return calls
