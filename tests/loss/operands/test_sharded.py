"""Heads that are DTensors, as FSDP 2 and tensor parallelism leave them: gathered, and their gradients sharded again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accuracy import with_gradients
from groups import alone_in_group
from loss_cases import FORMS, LISTS, each_of, fused
from problem import Problem, make_problem
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from fastkl.loss import jsd_loss, linear_list_logprobs, linear_ranks, linear_top_k, policy_gradient_loss

SHARDED = ("weight", "bias", "teacher_weight", "teacher_bias")
PLACEMENTS = {"rows": [Shard(0)], "whole": [Replicate()]}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    with alone_in_group():
        yield init_device_mesh("cpu", (1,))


def sharded(p: Problem, mesh: DeviceMesh, placements: list[Placement], fields: tuple[str, ...] = SHARDED) -> Problem:
    return p._replace(**{f: distribute_tensor(getattr(p, f), mesh, placements) for f in fields})


@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
@each_of(FORMS)
def test_gathered(name: str, options: dict[str, Any], placements: list[Placement], mesh: DeviceMesh) -> None:
    p = make_problem((2, 5))
    fields = SHARDED[:2] if name in LISTS else SHARDED
    ours = with_gradients(fused, name, sharded(p, mesh, placements, fields), **options)
    expected = with_gradients(fused, name, p, **options)
    assert torch.equal(ours.value, expected.value)
    assert not isinstance(ours.gradients["hidden"], DTensor)
    for field, gradient in ours.gradients.items():
        if isinstance(gradient, DTensor):
            assert list(gradient.placements) == placements
            gradient = gradient.full_tensor()
        assert torch.equal(gradient, expected.gradients[field]), field


def test_other_calls_and_options(mesh: DeviceMesh) -> None:
    p = make_problem((6,), dtype=torch.float32)
    q = sharded(p, mesh, [Shard(0)])
    assert torch.equal(linear_top_k(q.hidden, q.weight, 3).ids, linear_top_k(p.hidden, p.weight, 3).ids)
    tokens = p.tokens.clamp(min=0)
    ours, expected = (linear_list_logprobs(one.hidden, one.weight, tokens[:, None]) for one in (q, p))
    assert torch.equal(ours, expected)
    assert torch.equal(linear_ranks(q.hidden, q.weight, tokens), linear_ranks(p.hidden, p.weight, tokens))
    low, tokens = p.hidden.bfloat16(), tokens.clamp(max=8)
    ours, expected = (
        jsd_loss(low, one.weight, one.teacher_hidden, one.teacher_weight, tokens=tokens, vocab_size=9).loss
        for one in (q, p)
    )
    assert torch.equal(ours, expected)


def test_a_sharded_teacher_that_somebody_trains(mesh: DeviceMesh) -> None:
    """Its Parameters are detached before they are gathered."""
    p = make_problem((6,)).leaves()
    q = sharded(p, mesh, [Shard(0)], ("teacher_weight", "teacher_bias"))
    q = q._replace(teacher_weight=nn.Parameter(q.teacher_weight), teacher_bias=nn.Parameter(q.teacher_bias))
    ours = fused("reverse_kl", q)
    ours.backward()
    assert torch.equal(ours, fused("reverse_kl", p))
    assert q.teacher_weight.grad is None


def test_refused(mesh: DeviceMesh) -> None:
    p = make_problem((6,), dtype=torch.float32).leaves()
    hidden = distribute_tensor(p.hidden, mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"hidden is a DTensor; .*to_local"):
        fused("policy_gradient", p._replace(hidden=hidden))
    weight = distribute_tensor(p.weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="weight is a DTensor"):
        fused("policy_gradient", p._replace(weight=weight), weight_grad=torch.zeros(11, 5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.lm_head = nn.Linear(6, 6), nn.Linear(6, 13)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


def batch(rank: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rank)
    inputs, tokens = torch.randn(8, 6, generator=generator), torch.randint(13, (8,), generator=generator)
    return inputs, tokens, torch.randn(8, generator=generator)


def step(model: Model, ranks: list[int], parallel: int = 1) -> None:
    """Mean over the processes of each one's loss, as DDP and FSDP have it."""
    for rank in ranks:
        inputs, tokens, advantages = batch(rank)
        head = model.lm_head
        loss = policy_gradient_loss(model(inputs), head.weight, tokens, advantages, bias=head.bias).loss
        (loss / parallel).backward()


def worker(rank: int, folder: str, kind: str) -> None:
    store = dist.FileStore(f"{folder}/{kind}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh, model, plain = init_device_mesh("cpu", (2,)), Model(), Model()
    if kind == "fsdp":
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        step(model, [rank])
        step(plain, [0, 1], parallel=2)
    else:  # the head alone, over the vocabulary; both processes have the same rows
        head = model.lm_head
        head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
        head.bias = nn.Parameter(distribute_tensor(head.bias.detach(), mesh, [Shard(0)]))
        step(model, [0])
        step(plain, [0])
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        gradient = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
        assert isinstance(ours.grad, DTensor) == isinstance(ours, DTensor)
        assert isinstance(ours, DTensor) or "lm_head" not in name
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-5, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "tensor-parallel"])
def test_two_processes(tmp_path: Path, kind: str) -> None:
    """Gradients as one process with all the rows has them."""
    code = f"import test_sharded, sys; test_sharded.worker(int(sys.argv[1]), {str(tmp_path)!r}, {kind!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
