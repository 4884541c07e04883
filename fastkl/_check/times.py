"""How long the public losses take, in units of one GEMM that is measured in turn with them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastkl._check.losses import LOSSES, Call, value_and_gradients
from fastkl._check.problem import NAMES, Problem, Sizes, make_problem
from fastkl.loss import Sparse

# On a GPU the weight is far larger than its cache.
SIZES = {"cpu": Sizes(128, 512, 8192), "cuda": Sizes(4096, 2048, 65536)}
ROUNDS, SECONDS = 5, 10.0  # no round is begun after so many seconds
HEADS = {"value": None, "frozen head": False, "trained head": True}  # is the weight trained? None: no gradient
SPARSE = "policy gradient, sparse"


class Timed(NamedTuple):
    """One loss."""

    loss: str
    units: dict[str, float]  # by `HEADS`
    floor: dict[str, int]  # the products that exact gradients cannot do without


class Unit(NamedTuple):
    """A plain product hidden @ weightᵀ."""

    sizes: Sizes
    dtype: str
    milliseconds: float


def calls() -> dict[str, tuple[Call, int]]:
    """What is timed, and of how many heads logits are made."""
    policy_gradient = next(one.call for one in LOSSES if one.name == "policy gradient")
    sparse = {SPARSE: (lambda p, **options: policy_gradient(p, backward=Sparse(seed=0), **options), 1)}
    return {one.name: (one.call, one.heads) for one in LOSSES} | sparse


def timed(device: str, dtype: torch.dtype, sizes: Sizes | None = None) -> tuple[Unit, list[Timed]]:
    """Medians over rounds, in each of which everything runs once, the GEMM too."""
    sizes = SIZES[device] if sizes is None else sizes
    problem = make_problem(sizes, device=device).to(dtype, device)
    out = problem.hidden.new_empty(sizes.rows, sizes.vocabulary)
    gemm = "gemm"
    runs: dict[Any, Callable[[], object]] = {gemm: lambda: torch.mm(problem.hidden, problem.weight.t(), out=out)}
    for name, (call, _) in calls().items():
        runs |= {(name, head): _run(call, problem, trained) for head, trained in HEADS.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    start = time.perf_counter()
    for index in range(ROUNDS):
        if index and time.perf_counter() - start > SECONDS:
            break
        for name, run in runs.items():
            seconds[name].append(_seconds(run, device))
    unit = statistics.median(seconds[gemm])
    found = []
    for name, (_, heads) in calls().items():
        units = {head: statistics.median(seconds[name, head]) / unit for head in HEADS}
        found.append(Timed(name, units, {head: heads + place for place, head in enumerate(HEADS)}))
    return Unit(sizes, NAMES[dtype], 1e3 * unit), found


def _run(call: Call, problem: Problem, trained: bool | None) -> Callable[[], object]:
    if trained is None:
        return torch.no_grad()(lambda: call(problem))
    return lambda: value_and_gradients(call, problem, trained)


def _seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
