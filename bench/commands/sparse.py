"""Kept columns and gradient error of the sparse backward, against its two knobs.

    python -m bench sparse --data smollm2 --temperature 0.7 --json sparse.json

Columns of the table, keys of the JSON rows:

    error, threshold        the one that is given (docs/sparse-backward.md)
    block                   rows of a block, which share their columns
    kept                    fraction of the columns
    claimed                 the relative error that the loss expects (`metrics["grad_error"]`)
    hidden, weight          ‖g − g_exact‖ / ‖g_exact‖ of the two gradients, root mean square over the seeds
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.commands.loss import ENTROPY, default_shape
from bench.lib import arguments as checked
from bench.lib.cases import DATA, Case, make_case, mean_entropy
from bench.lib.machine import describe_machine, describe_versions
from fastkl.kernels.sparse import estimator as sparse_estimator
from fastkl.loss import Sparse, policy_gradient_loss

ERRORS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
THRESHOLDS = tuple(2.0**-power for power in range(13, 8, -1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=DATA, default="peaked", help="as in `bench loss`")
    parser.add_argument("--temperature", type=float, default=1.0, help="at which a real model sampled")
    parser.add_argument("--shape", type=checked.shape, metavar="N,D,V", help="as in `bench loss`")
    parser.add_argument("--blocks", type=checked.sizes, default=[128, 256], metavar="A,B", help="rows of a block")
    parser.add_argument("--seeds", type=checked.positive, default=2, help="samples of each setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    try:
        shape = arguments.shape or default_shape(arguments.data, arguments.temperature)
    except FileNotFoundError as error:
        parser.error(f"argument --data {arguments.data}: {error}")
    how = "trainable", "cpu", arguments.data, ENTROPY, 0, arguments.temperature
    case = make_case("policy_gradient", shape, torch.float32, *how)
    report: dict[str, Any] = {
        "rows": [],
        "conditions": {
            "data": arguments.data,
            "temperature": arguments.temperature,
            "shape": list(shape),
            "mean_entropy": mean_entropy(case),
            "seeds": arguments.seeds,
        },
        "machine": describe_machine("cpu"),
        "versions": describe_versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    print(f"{arguments.data}, N,D,V = {shape}, {report['conditions']['mean_entropy']:.2f} nats")
    print(f"{'':>22} {'block':>6} {'kept':>7} {'claimed':>9} {'hidden':>9} {'weight':>9}")
    for row in measure(case, arguments.blocks, arguments.seeds):
        report["rows"].append(row)
        knob = f"error {row['error']:.0e}" if row["threshold"] is None else f"threshold {row['threshold']:.1e}"
        errors = "".join(f" {row[name]:>9.1e}" for name in ("claimed", "hidden", "weight"))
        print(f"{knob:>22} {row['block']:>6} {row['kept']:>7.2%}{errors}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(case: Case, blocks: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """A row for each setting of each knob and each size of a block."""
    exact, _ = _gradients(case)
    settings: list[dict[str, float]] = [*({"error": e} for e in ERRORS), *({"threshold": t} for t in THRESHOLDS)]
    for block in blocks:
        for setting in settings:
            with _block_rows(block):
                found = [_gradients(case, backward=Sparse(seed, **setting)) for seed in range(seeds)]
            errors = torch.tensor([[_error(g, e) for g, e in zip(own, exact, strict=True)] for own, _ in found])
            hidden, weight = errors.square().mean(0).sqrt().tolist()
            kept, claimed = found[0][1]["kept_fraction"].item(), found[0][1]["grad_error"].item()
            yield {
                "error": None,
                "threshold": None,
                **setting,
                "block": block,
                "kept": kept,
                "claimed": claimed,
                "hidden": hidden,
                "weight": weight,
            }


def _gradients(case: Case, **how: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    case.clear_gradients()
    terms = case.tokens, case.advantages, case.sampler_logprobs
    output = policy_gradient_loss(case.hidden, case.weight, *terms, **how)
    output.loss.backward()
    return case.gradients(), output.metrics


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@contextmanager
def _block_rows(rows: int) -> Iterator[None]:
    before = sparse_estimator.BLOCK_ROWS
    sparse_estimator.BLOCK_ROWS = {**before, "cpu": rows}
    try:
        yield
    finally:
        sparse_estimator.BLOCK_ROWS = before
