"""`bench loss` on the shapes of four models, for every loss and head, in one process.

    python -m bench models --device cuda --dtype bf16 --seconds 150 --json models.json

fastkl and eager PyTorch come first, on everything; then the other peers beside fastkl, because they may take long to warm
up. A case that fails is reported and does not stop the next. No case is started when the time is up. The JSON file has the
reports of `bench loss` under "reports"; cases without a report, with the reason, are under "missing".
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench import peers
from bench.commands import loss
from bench.commands.count import SHAPES
from bench.lib import arguments as checked
from bench.lib.arguments import Shape
from bench.lib.cases import DTYPES, HEADS
from fastkl._check.json_file import write_json

SMALL = {"small": (64, 32, 1000)}
FIRST = ["fastkl", "fastkl_composed", "eager"]
OPS = ("logprobs", "policy_gradient", "reverse_kl")  # the others' costs follow from theirs
OUT_OF_TIME = "out of time"


class Job(NamedTuple):
    """What one report is of."""

    impl: tuple[str, ...]
    model: str
    shape: Shape
    op: str
    head: str

    def __str__(self) -> str:
        return f"{self.model}, {self.op}, {self.head}: {','.join(self.impl)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=checked.device, default="cuda", metavar="{cpu,cuda}", help="run there")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="set the dtype of hidden states and weight")
    implementations = checked.names("implementation", peers.names())
    parser.add_argument("--impl", type=implementations, metavar="A,B", help="measure these alone, in one go")
    parser.add_argument("--small", action="store_true", help="measure one small shape instead of the four models'")
    parser.add_argument("--repeats", type=checked.positive, default=7, help="take medians over this many rounds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this many seconds")
    checked.add_json(parser, ", anew after each case")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    start = time.perf_counter()
    reports: list[dict[str, Any]] = []
    missing: list[dict[str, str]] = []
    for job in jobs(SMALL if arguments.small else SHAPES, rounds(arguments.impl)):
        try:
            if time.perf_counter() - start > arguments.seconds:
                raise TimeoutError(OUT_OF_TIME)
            reports.append(_report(job, arguments))
        except TimeoutError as error:
            missing.append({"case": str(job), "reason": str(error)})
        except (Exception, SystemExit) as error:
            missing.append({"case": str(job), "reason": f"{type(error).__name__}: {error}"})
            print(f"{job}: {missing[-1]['reason']}", file=sys.stderr)
        write_json(arguments.json, {"reports": reports, "missing": missing})
        _release(arguments.device)
    print(_table(reports))
    failed = sum(entry["reason"] != OUT_OF_TIME for entry in missing)
    print(f"{len(reports)} cases, {failed} failed, {len(missing) - failed} left out for lack of time")
    if failed or not reports:
        sys.exit(1)


def rounds(impl: list[str] | None) -> list[list[str]]:
    """The implementations that are measured together; torch.compile, which takes minutes, is left out."""
    return [FIRST, ["fastkl", *sorted({*peers.names()} - {*FIRST, "compile"})]] if impl is None else [impl]


def jobs(shapes: dict[str, Shape], impls: list[list[str]]) -> Iterator[Job]:
    for impl, (model, shape), op, head in itertools.product(impls, shapes.items(), OPS, HEADS):
        yield Job(tuple(impl), model, shape, op, head)


def _report(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `bench loss` writes of one case."""
    parser = argparse.ArgumentParser()
    loss.add_arguments(parser)
    options = {
        "impl": ",".join(job.impl),
        "op": job.op,
        "head": job.head,
        "shape": ",".join(map(str, job.shape)),
        "dtype": arguments.dtype,
        "device": arguments.device,
        "repeats": arguments.repeats,
    }
    of_loss = parser.parse_args([f"--{name}={value}" for name, value in options.items()])
    return {"model": job.model, **loss.run(of_loss, parser)}


def _release(device: str) -> None:
    """What a case left behind must not be in the way of the next."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _table(reports: list[dict[str, Any]]) -> str:
    """Units of forward and of forward + backward, milliseconds, extra memory: one line an implementation."""
    return "\n".join(
        f"{report['model']:11} {row['op']:16} {row['head']:10} {row['impl']:18} {row['forward_units']:>5.2f} u "
        f"{row['forward_backward_units']:>5.2f} u {row['forward_backward_ms']:>8.2f} ms {row['peak_extra_mb']:>8.0f} MB  "
        f"error {row['grad_error']:.1e}"
        for report in reports
        for row in report["rows"]
    )
