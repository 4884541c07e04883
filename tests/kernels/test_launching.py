"""How kernels are launched: on which device, and what Triton's own launcher hands to a CUDA driver."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import Machine, fake_tensors

from fastkl.kernels import launch
from fastkl.kernels.problem import HeadOptions
from fastkl.kernels.rows.launch import launch_rows
from fastkl.kernels.score import triton as score
from fastkl.kernels.sparse import steps

HERE, THERE = torch.device("cuda", 0), torch.device("cuda", 1)


class TwoGenerations(Machine):
    """sm_90, which is current, and sm_80. It serves as a kernel, too, that notes where it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, 90, 80)
        self.launches: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **_: self.launches.append(self.current)


def test_plans_are_for_the_chip_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two generations in one process, whichever is current; which afterwards is current again."""
    machine = TwoGenerations(monkeypatch)
    with fake_tensors(monkeypatch):
        for device, access, columns, step in ((HERE, "descriptors", 256, 64), (THERE, "vectors", 128, 32)):
            hidden, weight = (torch.empty(rows, 512, dtype=torch.bfloat16, device=device) for rows in (16, 512))
            plan = score._plan([score.Head(hidden, weight, None, HeadOptions())])
            assert (plan[0], plan[1].block_n) == (access, columns)
            assert steps._product_config(weight, hidden).block_k == step
            launch_rows(machine, hidden, None, programs=2)
    assert (machine.launches, machine.current) == ([0, 1], 0)
    assert launch.target_of(THERE).arch == 80
