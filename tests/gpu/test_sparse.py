"""The sparse backward on a GPU: the error asked for, the same bits, no synchronisation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from accuracy import with_gradients
from devices import DEVICE, gpu, refused_synchronisation
from loss_cases import frozen_or_all, fused, fused_output
from problem import Problem
from sparse_cases import peaked_problem, relative_error

from bench import peers
from bench.lib.cases import make_case
from fastkl.loss import Sparse

pytestmark = gpu

ERROR = 0.02
HOW: dict[str, Any] = {"backward": Sparse(1, error=ERROR), "skip_zero_rows": False}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
names = pytest.mark.parametrize("name", ["policy_gradient", "reverse_kl"])


def problem(dtype: torch.dtype, vocabulary: int = 4000) -> Problem:
    return peaked_problem(64, dtype, vocabulary).to(DEVICE)


@dtypes
@names
@pytest.mark.parametrize("vocabulary", [4000, 4099])
def test_error_is_the_one_asked_for(name: str, dtype: torch.dtype, vocabulary: int) -> None:
    p = problem(dtype, vocabulary)
    exact = with_gradients(fused, name, p.double())
    ours, again = (with_gradients(fused, name, p, **HOW) for _ in range(2))
    for field, gradient in ours.gradients.items():
        assert torch.equal(gradient, again.gradients[field])
        assert relative_error(gradient, exact.gradients[field]) < 3 * ERROR
    metrics = fused_output(name, p.leaves(), **HOW).metrics
    assert ERROR / 1.2 < float(metrics["grad_error"]) < 1.2 * ERROR
    assert 0 < float(metrics["kept_fraction"]) < 0.5


@names
@frozen_or_all
def test_no_synchronisation(name: str, needs: tuple[str, ...]) -> None:
    p = problem(torch.bfloat16).leaves(needs)

    def step() -> list[torch.Tensor]:
        value = fused(name, p, **HOW)
        return [value.detach(), *torch.autograd.grad(value, [getattr(p, field) for field in needs])]

    expected = step()  # compiles; loading a kernel may synchronise
    with refused_synchronisation():
        found = step()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@names
def test_deterministic_algorithms_refuse_nothing(name: str) -> None:
    """But for products, if CUBLAS_WORKSPACE_CONFIG is not set."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with_gradients(fused, name, problem(torch.bfloat16), **HOW)
    finally:
        torch.use_deterministic_algorithms(before)
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "deterministic" in text and "CuBLAS" not in text]


@pytest.mark.parametrize("op", ["logprobs", "policy_gradient", "reverse_kl"])
def test_the_peer_of_the_benches(op: str) -> None:
    case = make_case(op, (64, 32, 1009), torch.float32, "trainable", DEVICE, "peaked", 0.5, 0)
    value = peers.build("fastkl_sparse", case)()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, case.gradient_inputs))
