"""Which row functions run: the documented rule, and no silent fallback."""

from __future__ import annotations

import sys

import pytest
import torch

from fastkl.kernels import rows_torch
from fastkl.kernels.backend import BACKENDS, row_function
from fastkl.loss import linear_logprobs

HIDDEN, WEIGHT, TOKENS = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 6, 0])


def test_auto_is_pytorch_on_a_cpu() -> None:
    for backend in set(BACKENDS) - {"triton"}:
        assert row_function("token_nll", backend, HIDDEN) is rows_torch.token_nll
        assert row_function("reverse_kl", backend, HIDDEN) is rows_torch.reverse_kl
    assert torch.equal(
        linear_logprobs(HIDDEN, WEIGHT, TOKENS), linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="torch")
    )


def test_triton_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match='need a CUDA or HIP device and the chunk is on cpu: pass backend="torch"'):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="triton")


def test_triton_that_cannot_be_imported_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fastkl.kernels.rows_triton", raising=False)
    monkeypatch.setitem(sys.modules, "fastkl.kernels.rows_triton", None)
    with pytest.raises(RuntimeError, match=r'backend is "triton", which needs triton >= 3.6.*backend="torch"'):
        row_function("token_nll", "triton", HIDDEN)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of auto, triton, torch"):
        linear_logprobs(HIDDEN, WEIGHT, TOKENS, backend="cuda")  # type: ignore[arg-type]
