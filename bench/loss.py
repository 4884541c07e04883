"""Time, memory and gradient error of the losses, ours and others', on one shape or several.

    python -m bench loss --op policy_gradient --shape 1536,576,49152 --dtype fp32 --head frozen --device cpu \\
        --impl fastkl,eager,compile,liger --json loss.json
    python -m bench loss --shape 1024,256,32768 --sweep N=256,512,1024 --sweep V=8192,32768 --json sweep.json

Columns of the table, keys of the JSON rows:

    forward_ms, forward_backward_ms     medians over the rounds; forward alone is the value under torch.no_grad()
    forward_units, ..._units            the same divided by the time of one plain GEMM hidden @ weightᵀ, measured in turn
    peak_extra_mb                       peak of forward + backward beyond the inputs and the gradients asked for (1e6 bytes)
    grad_error                          ‖g − g₆₄‖ / ‖g₆₄‖ against float64; trainable: the larger one of hidden and weight
    backward                            "exact", or how the gradient is estimated
    note                                what this implementation does that the others do not

Forward + backward cannot be exact below 2 units with a frozen head, 3 with a trainable one; a teacher adds one.
Implementations are the files of bench/peers/. One that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from bench import arguments as checked
from bench import peers
from bench.cases import DTYPES, HEADS, OPS, make_case, max_entropy
from bench.compare import Comparison, compare
from bench.machine import describe_machine, describe_versions

ENTROPY = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, default="policy_gradient")
    parser.add_argument(
        "--shape", type=checked.shape, default=(1536, 576, 49152), metavar="N,D,V", help="tokens, hidden, ids"
    )
    parser.add_argument(
        "--sweep",
        type=checked.sweep,
        action="append",
        default=[],
        metavar="AXIS=A,B",
        help="measure the shape with its N, D or V replaced by each of these, in one report; can be repeated",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument(
        "--impl",
        type=checked.implementations,
        default=["fastkl", "eager", "compile"],
        metavar="A,B",
        help=", ".join(peers.names()),
    )
    parser.add_argument("--head", choices=HEADS, default="frozen", help="does the weight get a gradient?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=checked.positive, default=7, help="rounds; the numbers are medians over them")
    parser.add_argument(
        "--data", choices=("peaked", "flat"), default="peaked", help="rows of a trained or of a new model"
    )
    parser.add_argument("--entropy", type=float, help=f"mean entropy of peaked rows, nats; {ENTROPY} by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, anew after each shape")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    shapes = checked.swept(arguments.shape, arguments.sweep)
    entropy = _entropy(arguments, shapes, parser)
    _check(arguments, parser)
    names = list(dict.fromkeys(arguments.impl))
    report = _empty_report(arguments, names)
    print(" | ".join(f"{key} {value}" for key, value in (report["machine"] | report["versions"]).items()))
    for shape in shapes:
        case = make_case(
            arguments.op, shape, DTYPES[arguments.dtype], arguments.head, arguments.device, entropy, arguments.seed
        )
        result = compare(case, names, arguments.repeats)
        report["problems"].append(result.problem)
        report["rows"] += result.rows
        report["skipped"] += result.skipped
        _print_table(arguments, result)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    _print_notes(report["rows"])


def _empty_report(arguments: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    packages = dict.fromkeys(package for name in names for package in peers.load(name).packages)
    return {
        "rows": [],
        "skipped": [],
        "problems": [],
        "conditions": {"repeats": arguments.repeats, "seed": arguments.seed, "data": arguments.data},
        "machine": describe_machine(arguments.device),
        "versions": describe_versions(*packages),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _print_table(arguments: argparse.Namespace, result: Comparison) -> None:
    problem = result.problem
    print(
        f"\n{arguments.op}, {arguments.head} head, {arguments.dtype}, N,D,V = {','.join(map(str, problem['shape']))}, "
        f"rows of {problem['mean_entropy']:.2f} nats, {arguments.repeats} rounds"
    )
    if result.rows:
        print(
            f"1 unit = one GEMM = {problem['gemm_ms']:.2f} ms; gradient errors over {problem['grad_error_rows']} rows"
        )
        print(f"\n{'':17} {'forward':>19} {'forward+backward':>19} {'extra memory':>13} {'gradient error':>15}")
    for row in result.rows:
        print(
            f"{row['impl']:17} {row['forward_ms']:>9.1f} ms {row['forward_units']:>4.2f} u "
            f"{row['forward_backward_ms']:>9.1f} ms {row['forward_backward_units']:>4.2f} u "
            f"{row['peak_extra_mb']:>10.1f} MB {row['grad_error']:>15.1e}"
        )
    for skipped in result.skipped:
        print(f"{skipped['impl']:17} skipped: {skipped['reason']}")


def _print_notes(rows: list[dict[str, Any]]) -> None:
    """Once for each implementation, however many shapes it was measured on."""
    if any(row["note"] or row["backward"] != "exact" for row in rows):
        print()
    for row in {row["impl"]: row for row in rows}.values():
        if row["backward"] != "exact":
            print(f"{row['impl']}: backward {row['backward']}")
        if row["note"]:
            print(f"{row['impl']}: {row['note']}")


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would fail minutes later."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; use --device cpu")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"argument --json: the folder {arguments.json.absolute().parent} does not exist; create it first")


def _entropy(
    arguments: argparse.Namespace, shapes: list[checked.Shape], parser: argparse.ArgumentParser
) -> float | None:
    """Nats of peaked rows, None for flat ones."""
    if arguments.data == "flat":
        if arguments.entropy is not None:
            parser.error(
                "argument --entropy: flat rows have the entropy that they have; leave it away with --data flat"
            )
        return None
    entropy = ENTROPY if arguments.entropy is None else float(arguments.entropy)
    smallest = min(vocabulary for _, _, vocabulary in shapes)
    largest = max_entropy(smallest)
    if not 0 < entropy <= largest:
        parser.error(f"argument --entropy: {entropy} nats; with V = {smallest} use one > 0 and <= {largest:.2f}")
    return entropy
