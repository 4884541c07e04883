"""Measuring: interleaved times, peak memory, and the error of gradients against float64."""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.lib.cases import Case
from bench.peers import Loss, eager

# Work that a float64 reference may cost, and the size of its blocks of rows.
REFERENCE_FLOPS = {"cpu": 4e11, "cuda": 5e13}
REFERENCE_BYTES = 2**29
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # "cpu" adds the threads up, and ignores other processes
ROW_MULTIPLE = 8  # of the rows compared: some peers need an aligned number


@dataclasses.dataclass(frozen=True)
class Times:
    """Medians over the rounds, in milliseconds."""

    forward: float  # the value alone, under torch.no_grad()
    forward_backward: float


def interleaved_times(
    case: Case, losses: dict[str, Loss], repeats: int, clock: str = "wall"
) -> tuple[float, dict[str, Times]]:
    """Milliseconds of one GEMM unit and of each loss, by a clock of CLOCKS.

    A round runs the GEMM and everything else once, in turn.

    The GEMM is a plain `torch.mm(hidden, weightᵀ)` into an existing tensor, 2·N·D·V floating-point operations. Whatever
    else the machine does meets everyone alike, and the units are free of its clock. Each call has run before (`warm_up`).
    """
    hidden, weight = case.hidden.detach(), case.weight.detach()
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])

    def gemm() -> Tensor:
        return torch.mm(hidden, weight.t(), out=logits)

    def milliseconds(step: Callable[[Loss], None], loss: Loss) -> float:
        return _milliseconds(step, loss, hidden.device, CLOCKS[clock])

    gemm()
    gemm_ms: list[float] = []
    forward: dict[str, list[float]] = {name: [] for name in losses}
    both: dict[str, list[float]] = {name: [] for name in losses}
    names = list(losses)
    for _ in range(repeats):
        gemm_ms.append(milliseconds(_forward, gemm))
        for name in names:
            forward[name].append(milliseconds(_forward, losses[name]))
            both[name].append(milliseconds(_forward_backward, losses[name]))
            case.clear_gradients()
        names = names[1:] + names[:1]  # nobody always follows the same neighbour
    median = statistics.median
    return median(gemm_ms), {name: Times(median(forward[name]), median(both[name])) for name in losses}


def warm_up(case: Case, loss: Loss) -> None:
    """Both passes once: compilation, autotuning, lazy initialisation."""
    case.clear_gradients()
    _forward(loss)
    _forward_backward(loss)
    case.clear_gradients()


def peak_extra_bytes(case: Case, loss: Loss) -> int:
    """The peak of forward + backward beyond the inputs and the gradients asked for; what the loss itself needs.

    (peak − allocated before − bytes of the gradients), at least 0. Memory that was taken once and is kept, such as the
    workspace of cuBLAS, was taken in `warm_up`; what goes past torch's allocator is not seen.
    """
    case.clear_gradients()
    peak = peak_allocated(lambda: loss().backward(), case.hidden.device)
    gradients = sum(g.numel() * g.element_size() for g in case.gradients())
    case.clear_gradients()
    return max(0, peak - gradients)


def peak_allocated(run: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes alive at once during `run` of those allocated in it."""
    gc.collect()  # what an earlier run left in a cycle must not be released in this one
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler writes down each allocation (+) and release (−) that torch's CPU allocator makes, in order.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def reference_rows(case: Case) -> int:
    """The number of rows whose gradients are compared: all, or what a float64 reference can do in seconds."""
    n, d = case.hidden.shape
    affordable = int(REFERENCE_FLOPS[case.hidden.device.type] / (6 * d * case.weight.shape[0]))
    if affordable > ROW_MULTIPLE:
        affordable -= affordable % ROW_MULTIPLE
    return min(n, max(1, affordable))


def reference_gradients(case: Case) -> list[Tensor]:
    """The gradients of the case by eager autograd in float64, a block of rows at a time."""
    exact = case.in_float64()
    exact.clear_gradients()
    n = exact.hidden.shape[0]
    step = max(1, REFERENCE_BYTES // (8 * exact.weight.shape[0]))
    hidden_gradients = []
    for start in range(0, n, step):
        block = exact.rows(slice(start, start + step))
        (eager.loss(block) * (block.hidden.shape[0] / n)).backward()
        hidden_gradients.append(block.gradients()[0])
    weight_gradient = [] if exact.weight.grad is None else [exact.weight.grad]
    return [torch.cat(hidden_gradients), *weight_gradient]


def gradient_error(case: Case, loss: Loss, exact: list[Tensor]) -> float:
    """‖g − g₆₄‖ / ‖g₆₄‖ (Frobenius) of the gradient by hidden; with a trainable head the larger of it and the weight's."""
    case.clear_gradients()
    loss().backward()
    errors = []
    for gradient, reference in zip(case.gradients(), exact, strict=True):
        difference = torch.linalg.vector_norm(gradient.double() - reference)
        errors.append((difference / torch.linalg.vector_norm(reference)).item())
    case.clear_gradients()
    return max(errors)


@torch.no_grad()
def _forward(loss: Loss) -> None:
    loss()


def _forward_backward(loss: Loss) -> None:
    loss().backward()


def _milliseconds(step: Callable[[Loss], None], loss: Loss, device: torch.device, now: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    step(loss)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (now() - start)
