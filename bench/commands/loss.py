"""Time, memory and gradient error of the losses, fastkl's and others', on one shape or several.

    python -m bench loss --op policy_gradient --shape 1536,576,49152 --dtype fp32 --head frozen --device cpu \\
        --impl fastkl,eager,compile,liger --json loss.json
    python -m bench loss --shape 1024,256,32768 --sweep N=256,512,1024 --sweep V=8192,32768 --json sweep.json
    python -m bench loss --op jsd --head trainable --shape 512,576,49152 --teacher-width 960 --impl fastkl,liger,trl
    python -m bench loss --backward exact,sparse --data smollm2 --temperature 0.7 --head trainable

Columns of the table, keys of the JSON rows:

    forward_ms, forward_backward_ms     medians over the rounds; forward alone is the value under torch.no_grad()
    forward_units, ..._units            the same divided by the time of one plain GEMM hidden @ weightᵀ, measured in turn
    peak_extra_mb                       peak of forward + backward beyond the inputs and the gradients asked for (1e6 bytes)
    grad_error                          ‖g − g₆₄‖ / ‖g₆₄‖ against float64; trainable: the larger one of hidden and weight
    backward                            "exact", or how the gradient is estimated
    note                                what this implementation does that the others do not

Forward + backward cannot be exact below 2 units with a frozen head, 3 with a trainable one; a teacher adds D_t/D.
Implementations are the files of bench/peers/. One that cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import peers
from bench.lib import arguments as checked
from bench.lib.cases import BETAS, DTYPES, ENTROPY, HEADS, OPS, make_case, max_entropy
from bench.lib.compare import Comparison, compare
from bench.lib.report import circumstances
from bench.lib.rows_arguments import add_rows_arguments, shapes_and_temperature
from fastkl._check.json_file import write_json

BACKWARDS = {"exact": "fastkl", "sparse": "fastkl_sparse"}  # the implementation of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, default="policy_gradient", help="choose the loss")
    add_rows_arguments(parser)
    parser.add_argument(
        "--sweep",
        type=checked.sweep,
        action="append",
        default=[],
        metavar="AXIS=A,B",
        help="replace N, D or V of the shape by each of these, in one report; can be repeated",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="set the dtype of hidden states and weight")
    checked.add_names(
        parser, "--impl", "implementation", peers.names(), "measure these", default=["fastkl", "eager", "compile"]
    )
    parser.add_argument(
        "--backward",
        type=checked.names("backward", tuple(BACKWARDS)),
        default=["exact"],
        metavar="A,B",
        help="measure fastkl with these: exact, sparse, or both side by side (docs/losses/sparse-backward.md)",
    )
    parser.add_argument("--head", choices=HEADS, default="frozen", help="give the weight a gradient or none")
    parser.add_argument("--device", type=checked.device, default="cpu", metavar="{cpu,cuda}", help="run there")
    parser.add_argument(
        "--teacher-width",
        type=checked.positive,
        metavar="D_T",
        help="give the teacher of a divergence hidden states this wide; the student's width by default",
    )
    checked.add_clock(parser)
    parser.add_argument("--repeats", type=checked.positive, default=7, help="take medians over this many rounds")
    parser.add_argument(
        "--entropy", type=float, help=f"set the mean entropy of peaked rows, nats; {ENTROPY} by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed the rows")
    checked.add_json(parser, ", anew after each shape")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Returns the report."""
    shapes, temperature = shapes_and_temperature(arguments, parser, arguments.sweep)
    entropy = _entropy(arguments, shapes, parser)
    _check_teacher_width(arguments, shapes, parser)
    checked.check_clock(arguments, parser)
    names = _names(arguments.impl, arguments.backward)
    report = _empty_report(arguments, temperature, names)
    print(" | ".join(f"{key} {value}" for key, value in (report["machine"] | report["versions"]).items()))
    for shape in shapes:
        tensors = DTYPES[arguments.dtype], arguments.head, arguments.device
        rows = arguments.data, entropy, arguments.seed
        case = make_case(arguments.op, shape, *tensors, *rows, temperature, arguments.teacher_width)
        result = compare(case, names, arguments.repeats, arguments.clock)
        report["problems"].append(result.problem)
        report["rows"] += result.rows
        report["skipped"] += result.skipped
        _print_table(arguments, result)
        write_json(arguments.json, report)
    _print_notes(report["rows"])
    return report


def _empty_report(arguments: argparse.Namespace, temperature: float, names: list[str]) -> dict[str, Any]:
    packages = dict.fromkeys(package for name in names for package in peers.load(name).packages)
    return {
        "rows": [],
        "skipped": [],
        "problems": [],
        "conditions": {
            "repeats": arguments.repeats,
            "seed": arguments.seed,
            "data": arguments.data,
            "temperature": temperature,
            "teacher_width": arguments.teacher_width,
            "clock": arguments.clock,
        },
        **circumstances(arguments.device, *packages),
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


def _names(implementations: list[str], backwards: list[str]) -> list[str]:
    """`fastkl` stands for each of the backward passes asked for."""
    chosen = [[BACKWARDS[b] for b in backwards] if name == "fastkl" else [name] for name in implementations]
    return list(dict.fromkeys(name for names in chosen for name in names))


def _check_teacher_width(
    arguments: argparse.Namespace, shapes: list[checked.Shape], parser: argparse.ArgumentParser
) -> None:
    width, needed = arguments.teacher_width, max(d for _, d, _ in shapes)
    if width is None:
        return
    if arguments.op not in BETAS:
        parser.error(f"argument --teacher-width: op {arguments.op} has no teacher; it belongs to {', '.join(BETAS)}")
    if width < needed:
        parser.error(f"argument --teacher-width: {width}; it must be at least the student's width, {needed}")


def _entropy(
    arguments: argparse.Namespace, shapes: list[checked.Shape], parser: argparse.ArgumentParser
) -> float | None:
    """Nats of rows whose entropy can be chosen, None for others."""
    data = arguments.data
    if data not in ("peaked", "unshared"):
        if arguments.entropy is not None:
            parser.error(
                f"argument --entropy: {data} rows have an entropy of their own; leave it out with --data {data}"
            )
        return None
    entropy = ENTROPY if arguments.entropy is None else float(arguments.entropy)
    smallest = min(vocabulary for _, _, vocabulary in shapes)
    largest = max_entropy(smallest)
    if not 0 < entropy <= largest:
        parser.error(f"argument --entropy: {entropy} nats; with V = {smallest} use one > 0 and <= {largest:.2f}")
    return entropy
