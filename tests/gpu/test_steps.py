"""A training step on a GPU as trainers run it: captured in a CUDA graph, without synchronisation, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE, DRY_RUN, gpu, needs_device, refused_synchronisation
from loss_cases import FORMS, each_of, frozen_or_all, fused
from problem import Problem, make_problem
from torch import Tensor

pytestmark = gpu

CAPPED = ("policy_gradient", {"method": "ppo", "dual_clip": 3.0, "softcap": 5.0})
forms = each_of({**FORMS, "policy_gradient-ppo": CAPPED})


def problem(needs: tuple[str, ...], seed: int = 0) -> Problem:
    """Three chunks of 40 rows."""
    return make_problem((4, 30), 5003, 64, torch.bfloat16, seed).to(DEVICE).leaves(needs)


def step(name: str, p: Problem, needs: tuple[str, ...], **options: Any) -> list[Tensor]:
    """The loss and its gradients, with nothing that the host has to know."""
    value = fused(name, p, skip_zero_rows=False, chunk_size=40, **options).sum()
    return [value.detach(), *torch.autograd.grad(value, [getattr(p, field) for field in needs])]


def assert_close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-2, atol=1e-2 * float(other.abs().max()))


@needs_device
@forms
@frozen_or_all
def test_cuda_graph(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Captured once; replayed on other numbers in the same places."""
    p = problem(needs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(name, p, needs, **options)  # compiles and allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(name, p, needs, **options)
    for seed in (0, 1):
        fresh = problem(needs, seed)
        with torch.no_grad():
            for mine, new in zip(p, fresh, strict=True):
                if mine is not None:
                    mine.copy_(new)
        graph.replay()
        assert_close(captured, step(name, fresh, needs, **options))


@forms
@frozen_or_all
def test_no_synchronisation(name: str, options: dict[str, Any], needs: tuple[str, ...]) -> None:
    p = problem(needs)
    expected = step(name, p, needs, **options)  # compiles; loading a kernel may synchronise
    with refused_synchronisation():
        found = step(name, p, needs, **options)
    assert_close(found, expected)


@needs_device
def test_a_synchronisation_would_be_noticed() -> None:
    total = torch.ones(3, device=DEVICE).sum()
    with pytest.raises(RuntimeError, match="synchroniz"), refused_synchronisation():
        total.item()


@frozen_or_all
@pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl"])
def test_compiled_in_one_graph(name: str, needs: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    p = problem(needs)

    def loss(p: Problem) -> Tensor:
        return fused(name, p._replace(hidden=torch.tanh(p.hidden)), skip_zero_rows=False, chunk_size=40)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    found = []
    for function in (compiled, loss):
        value = function(p)
        found.append([value.detach(), *torch.autograd.grad(value, [getattr(p, field) for field in needs])])
    assert_close(*found)
