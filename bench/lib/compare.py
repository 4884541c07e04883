"""All implementations on one problem: rows of what runs, reasons of what does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from bench import peers
from bench.lib import measure
from bench.lib.cases import DTYPES, Case, mean_entropy
from bench.peers import Loss, Unsupported


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a report holds of one problem."""

    problem: dict[str, Any]  # the shape and what is common to its rows
    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]]


def compare(case: Case, names: list[str], repeats: int, clock: str = "wall") -> Comparison:
    torch.compiler.reset()  # the shapes of another problem would make this one's dynamic
    shape = [*case.hidden.shape, case.weight.shape[0]]
    result = Comparison({"shape": shape, "mean_entropy": mean_entropy(case)}, [], [])
    losses: dict[str, Loss] = {}
    for name in names:
        try:
            losses[name] = _ready(name, case)
        except Unsupported as error:
            result.skipped.append({"impl": name, "shape": shape, "reason": str(error)})
    if not losses:
        return result
    extra = {name: measure.peak_extra_bytes(case, loss) for name, loss in losses.items()}
    gemm_ms, times = measure.interleaved_times(case, losses, repeats, clock)
    compared, errors = _gradient_errors(case, losses)
    result.problem.update(gemm_ms=gemm_ms, grad_error_rows=compared)
    for name in losses:
        peer = peers.load(name)
        result.rows.append(
            {
                "impl": name,
                "op": case.op,
                "head": case.head,
                "backward": peer.backward,
                "note": peer.notes.get(case.op),
                "dtype": next(dtype for dtype in DTYPES if DTYPES[dtype] == case.hidden.dtype),
                "device": case.hidden.device.type,
                "shape": shape,
                "forward_ms": times[name].forward,
                "forward_backward_ms": times[name].forward_backward,
                "forward_units": times[name].forward / gemm_ms,
                "forward_backward_units": times[name].forward_backward / gemm_ms,
                "peak_extra_mb": extra[name] / 1e6,
                "grad_error": errors[name],
            }
        )
    return result


def _ready(name: str, case: Case) -> Loss:
    """The loss, warm. What a package of other people's raises is a reason to skip it; our own errors are errors."""
    try:
        loss = peers.build(name, case)
        measure.warm_up(case, loss)
    except Unsupported:
        raise
    except torch.OutOfMemoryError as error:
        raise Unsupported("out of memory") from error
    except Exception as error:
        if not peers.load(name).packages:
            raise
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise Unsupported(f"fails: {type(error).__name__}: {first_line}") from error
    return loss


def _gradient_errors(case: Case, losses: dict[str, Loss]) -> tuple[int, dict[str, float]]:
    """The number of rows compared, and each loss's error; against the problem that the loss solves."""
    n, compared = case.hidden.shape[0], measure.reference_rows(case)
    some = case if compared == n else case.rows(torch.arange(compared, device=case.hidden.device) * n // compared)
    exact = measure.reference_gradients(some)
    errors = {}
    for name, loss in losses.items():
        solved = peers.load(name).solves(some)
        reference = exact if solved is some else measure.reference_gradients(solved)
        errors[name] = measure.gradient_error(some, loss if some is case else peers.build(name, some), reference)
    return compared, errors
