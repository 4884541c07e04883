"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkl.kernels import driver, gemm, workspace
from fastkl.kernels.score import cpu as score_cpu

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # as `make test` has it: what is not here is not asked for, again and again


@pytest.fixture
def gemms(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The GEMMs that the driver and a CPU's scorer make from here on, by name: the number of rows of each call."""
    rows: dict[str, list[int]] = {"project": [], "hidden_gradient": [], "add_weight_gradient": []}

    def count(name: str, position: int) -> None:
        original: Callable[..., Tensor | None] = getattr(gemm, name)

        def counted(*args: Any, **options: Any) -> Tensor | None:
            rows[name].append(args[position].shape[0])
            return original(*args, **options)

        for module in (driver, workspace, score_cpu):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted)

    count("project", 0)  # hidden [n, D]
    count("hidden_gradient", 0)  # gradient [n, V]
    count("add_weight_gradient", 1)  # accumulator, gradient [n, V]
    return rows


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors of the tests are tiny: a second thread costs more than it brings."""
    torch.set_num_threads(1)
