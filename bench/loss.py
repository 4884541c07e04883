"""Time, memory and gradient error of the losses, ours and others', on one shape.

    python -m bench loss --op policy_gradient --shape 1536,576,49152 --dtype fp32 --head frozen --device cpu \\
        --impl fastkl,eager,compile,torch --json loss.json

Columns of the table, keys of the JSON rows:

    forward_ms, forward_backward_ms     medians over the rounds; forward alone is the value under torch.no_grad()
    forward_units, ..._units            the same divided by the time of one plain GEMM hidden @ weightᵀ, measured in turn
    peak_extra_mb                       peak of forward + backward beyond the inputs and the gradients asked for (1e6 bytes)
    grad_error                          ‖g − g₆₄‖ / ‖g₆₄‖ against float64; trainable: the larger one of hidden and weight
    backward                            "exact", or how the gradient is estimated

Forward + backward cannot be exact below 2 units with a frozen head, 3 with a trainable one; a teacher adds one.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.cases import DTYPES, HEADS, OPS, Case, make_case, max_entropy, mean_entropy
from bench.implementations import MODULES, Unsupported, build
from bench.machine import describe_machine, describe_versions

SMALLEST = (1, 1, 16)  # N, D, V


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, default="policy_gradient")
    parser.add_argument("--shape", type=_shape, default=(1536, 576, 49152), metavar="N,D,V", help="tokens, hidden, ids")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--impl", type=_names, default=["fastkl", "eager"], metavar="A,B", help=", ".join(MODULES))
    parser.add_argument("--composed", action="store_true", help="also fastkl-composed: the loss on linear_logprobs")
    parser.add_argument("--head", choices=HEADS, default="frozen", help="does the weight get a gradient?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=_positive, default=7, help="rounds; the numbers are medians over them")
    parser.add_argument("--entropy", type=float, default=1.0, help="mean entropy of the rows, nats")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    _check(arguments, parser)
    names = list(dict.fromkeys(arguments.impl + ["fastkl-composed"] * arguments.composed))
    case = make_case(
        arguments.op,
        arguments.shape,
        DTYPES[arguments.dtype],
        arguments.head,
        arguments.device,
        arguments.entropy,
        arguments.seed,
    )
    report = {
        "rows": [],
        "skipped": [],
        "conditions": {"repeats": arguments.repeats, "seed": arguments.seed, "mean_entropy": mean_entropy(case)},
        "machine": describe_machine(arguments.device),
        "versions": describe_versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    _measure(case, names, arguments, report)
    _print(arguments, report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def _measure(case: Case, names: list[str], arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fill in the rows of what runs and the reasons of what does not."""
    losses: dict[str, measure.Loss] = {}
    for name in names:
        try:
            loss = build(name, case)
            measure.warm_up(case, loss)
        except (Unsupported, torch.OutOfMemoryError) as error:
            reason = str(error) if isinstance(error, Unsupported) else "out of memory"
            report["skipped"].append({"impl": name, "reason": reason})
        else:
            losses[name] = loss
    if not losses:
        return
    extra = {name: measure.peak_extra_bytes(case, loss) for name, loss in losses.items()}
    gemm_ms, times = measure.interleaved_times(case, losses, arguments.repeats)
    n, compared = case.hidden.shape[0], measure.reference_rows(case)
    some = case if compared == n else case.rows(torch.arange(compared, device=case.hidden.device) * n // compared)
    exact = measure.reference_gradients(some)
    report["conditions"] |= {"gemm_ms": gemm_ms, "grad_error_rows": compared}
    for name, loss in losses.items():
        report["rows"].append(
            {
                "impl": name,
                "op": arguments.op,
                "head": arguments.head,
                "backward": "exact",
                "dtype": arguments.dtype,
                "device": arguments.device,
                "shape": list(arguments.shape),
                "forward_ms": times[name].forward,
                "forward_backward_ms": times[name].forward_backward,
                "forward_units": times[name].forward / gemm_ms,
                "forward_backward_units": times[name].forward_backward / gemm_ms,
                "peak_extra_mb": extra[name] / 1e6,
                "grad_error": measure.gradient_error(some, loss if some is case else build(name, some), exact),
            }
        )


def _print(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    print(" | ".join(f"{key} {value}" for key, value in (report["machine"] | report["versions"]).items()))
    print(
        f"{arguments.op}, {arguments.head} head, {arguments.dtype}, N,D,V = {','.join(map(str, arguments.shape))}, "
        f"rows of {conditions['mean_entropy']:.2f} nats, {arguments.repeats} rounds"
    )
    if report["rows"]:
        print(
            f"1 unit = one GEMM = {conditions['gemm_ms']:.2f} ms; gradient errors over {conditions['grad_error_rows']} rows"
        )
        print(f"\n{'':16} {'forward':>19} {'forward+backward':>19} {'extra memory':>13} {'gradient error':>15}")
    for row in report["rows"]:
        print(
            f"{row['impl']:16} {row['forward_ms']:>9.1f} ms {row['forward_units']:>4.2f} u "
            f"{row['forward_backward_ms']:>9.1f} ms {row['forward_backward_units']:>4.2f} u "
            f"{row['peak_extra_mb']:>10.1f} MB {row['grad_error']:>15.1e}"
        )
    for skipped in report["skipped"]:
        print(f"{skipped['impl']:16} skipped: {skipped['reason']}")


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would fail minutes later."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here; use --device cpu")
    largest = max_entropy(arguments.shape[2])
    if not 0 < arguments.entropy <= largest:
        parser.error(
            f"argument --entropy: {arguments.entropy} nats; with V = {arguments.shape[2]} use one > 0 and <= {largest:.2f}"
        )
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"argument --json: the folder {arguments.json.absolute().parent} does not exist; create it first")


def _shape(text: str) -> tuple[int, int, int]:
    try:
        n, d, vocabulary = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N,D,V; write three integers, as in 1536,576,49152") from None
    if any(size < least for size, least in zip((n, d, vocabulary), SMALLEST, strict=True)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is too small; N,D,V must be at least {','.join(map(str, SMALLEST))}"
        )
    return n, d, vocabulary


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MODULES:
            raise argparse.ArgumentTypeError(f"unknown implementation {name!r}; use some of {', '.join(MODULES)}")
    if not names:
        raise argparse.ArgumentTypeError(f"names no implementation; use some of {', '.join(MODULES)}")
    return names


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)
