"""Kept columns and gradient error of the sparse backward, against its two knobs.

    python -m bench sparse --data smollm2 --temperature 0.7 --json sparse.json

Columns of the table, keys of the JSON rows:

    error, threshold        the one that is given (docs/losses/sparse-backward.md)
    block                   rows of a block, which share their columns
    kept                    fraction of the columns
    claimed                 the relative error that the loss expects (`metrics["grad_error"]`)
    hidden, weight          ‖g − g_exact‖ / ‖g_exact‖ of the two gradients, root mean square over the seeds
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.lib import arguments as checked
from bench.lib.cases import ENTROPY, Case, make_case, mean_entropy
from bench.lib.report import circumstances
from bench.lib.rows_arguments import add_rows_arguments, shapes_and_temperature
from fastkl._check.json_file import write_json
from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.loss import Backward, Sparse, policy_gradient_loss

ERRORS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
THRESHOLDS = tuple(2.0**-power for power in range(13, 8, -1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rows_arguments(parser)
    parser.add_argument(
        "--blocks", type=checked.sizes, default=[128, 256], metavar="A,B", help="make blocks of this many rows"
    )
    parser.add_argument("--seeds", type=checked.positive, default=2, help="draw this many samples for each setting")
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    (shape,), temperature = shapes_and_temperature(arguments, parser, [])
    case = make_case(
        "policy_gradient", shape, torch.float32, "trainable", "cpu", arguments.data, ENTROPY, 0, temperature
    )
    report: dict[str, Any] = {
        "rows": [],
        "conditions": {
            "data": arguments.data,
            "temperature": temperature,
            "shape": list(shape),
            "mean_entropy": mean_entropy(case),
            "seeds": arguments.seeds,
        },
        **circumstances("cpu"),
    }
    print(f"{arguments.data}, N,D,V = {shape}, {report['conditions']['mean_entropy']:.2f} nats")
    print(f"{'':>22} {'block':>6} {'kept':>7} {'claimed':>9} {'hidden':>9} {'weight':>9}")
    for row in measure(case, arguments.blocks, arguments.seeds):
        report["rows"].append(row)
        knob = f"error {row['error']:.0e}" if row["threshold"] is None else f"threshold {row['threshold']:.1e}"
        errors = "".join(f" {row[name]:>9.1e}" for name in ("claimed", "hidden", "weight"))
        print(f"{knob:>22} {row['block']:>6} {row['kept']:>7.2%}{errors}", flush=True)
    write_json(arguments.json, report)


def measure(case: Case, blocks: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each setting of each knob and each size of a block."""
    exact, _ = _gradients(case)
    settings: list[dict[str, float]] = [*({"error": e} for e in ERRORS), *({"threshold": t} for t in THRESHOLDS)]
    for block in blocks:
        for setting in settings:
            with _block_rows(block):
                gradients, metrics = zip(*(_gradients(case, Sparse(s, **setting)) for s in range(seeds)), strict=True)
            errors = torch.tensor([list(map(_error, sparse, exact)) for sparse in gradients])
            hidden, weight = errors.square().mean(0).sqrt().tolist()
            kept, claimed = metrics[0]["kept_fraction"].item(), metrics[0]["grad_error"].item()
            columns = {"block": block, "kept": kept, "claimed": claimed}
            yield {"error": None, "threshold": None, **setting, **columns, "hidden": hidden, "weight": weight}


def _gradients(case: Case, backward: Backward = "exact") -> tuple[list[Tensor], dict[str, Tensor]]:
    case.clear_gradients()
    terms = case.tokens, case.advantages, case.sampler_logprobs
    output = policy_gradient_loss(case.hidden, case.weight, *terms, backward=backward)
    output.loss.backward()
    return case.gradients(), output.metrics


def _error(estimate: Tensor, exact: Tensor) -> float:
    return float((estimate - exact).norm() / exact.norm())


@contextmanager
def _block_rows(rows: int) -> Iterator[None]:
    before = sparse_estimator.BLOCK_ROWS
    sparse_estimator.BLOCK_ROWS = {**before, "cpu": rows}
    try:
        yield
    finally:
        sparse_estimator.BLOCK_ROWS = before
