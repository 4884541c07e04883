"""Does fastkl work on this machine? `python -m fastkl.check` says so within about a minute.

    python -m fastkl.check [--device {cpu,cuda}] [--json FILE]

It prints versions, the device and the backend that the losses will use. Then it compares each kernel and each loss with
`fastkl.reference` in float64, in every dtype of the device, and measures how long the losses take. It needs torch, and on a
GPU triton. docs/speed/speed.md says what the tables mean.

Exit status: 0 if all errors are within their bounds, 1 if not, 2 for wrong arguments. FILE gets the same as JSON. It is
replaced after each line of the table, so that it is whole at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastkl import __version__
from fastkl._check import kernels, losses, machine, report
from fastkl._check.compiling import compile_launches, cores
from fastkl._check.errors import Check, Measured
from fastkl._check.json_file import writable, write_json
from fastkl._check.problem import NAMES, SIZES, Sizes, make_problem
from fastkl._check.times import timed
from fastkl.kernels.problem import Backend

LOSS_ROWS, LOSS_DIM = 24, 64  # of the checks of the losses: float64 takes its time on a CPU

Checks = dict[str, list[Check]]  # by dtype


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = _arguments(argv)
    start, device = time.perf_counter(), arguments.device
    choice, dtypes = machine.choose_backend(device), machine.dtypes(device)
    found: dict[str, Any] = {
        "fastkl": __version__,
        "versions": machine.versions("triton", "transformers"),
        "device": machine.describe_device(device),
        "backend": choice.backend,
        "missing": machine.missing(choice.backend),
        "checks": [],
        "complete": False,
    }
    print("\n".join(_introduction(found, choice.reason)), flush=True)
    write_json(arguments.json, found)
    checks = make_checks(device, choice.backend, dtypes)
    if choice.backend == "triton":
        _compile(checks)
    print(report.header("error against float64", list(checks)))
    for kernel, cells in by_kernel(checks):
        print(report.errors_line(kernel, list(cells.values())), flush=True)
        found["checks"] += [report.record(dtype, one) for dtype, cell in cells.items() for one in cell]
        write_json(arguments.json, found)
    failed = [one for one in found["checks"] if not one["ok"]]
    if not failed:  # what is wrong has no speed
        unit, times = timed(device, torch.float32 if device == "cpu" else dtypes[1])
        found |= {"unit": unit._asdict(), "times": [one._asdict() for one in times]}
        print("\n".join(report.times_lines(unit, times)))
    found |= {"seconds": round(time.perf_counter() - start, 1), "complete": True}
    write_json(arguments.json, found)
    print("\n".join(report.conclusion(found["checks"], found["seconds"])))
    return 1 if failed else 0


def make_checks(device: str, backend: Backend, dtypes: list[torch.dtype], sizes: Sizes | None = None) -> Checks:
    """Of each kernel and of each loss."""
    sizes = SIZES[device] if sizes is None else sizes
    problem, small = make_problem(sizes), make_problem(Sizes(LOSS_ROWS, LOSS_DIM, sizes.vocabulary))
    return {
        NAMES[dtype]: [
            *kernels.checks(problem, dtype, device, backend),
            *losses.checks(small, dtype, device, backend),
        ]
        for dtype in dtypes
    }


def by_kernel(checks: Checks) -> Iterator[tuple[str, dict[str, list[Measured]]]]:
    """Runs them: a kernel at a time, and of each dtype what was measured."""
    longest = max(checks.values(), key=len)
    for names in (check.kernels for check in longest):
        cells = {
            dtype: [one for check in each if check.kernels == names for one in _measured(check)]
            for dtype, each in checks.items()
        }
        for kernel in names:
            yield kernel, {dtype: [one for one in cell if one.kernel == kernel] for dtype, cell in cells.items()}


def _measured(check: Check) -> list[Measured]:
    """What a check raises is an error without a size."""
    try:
        return check.measure(check.run())
    except Exception as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = f"{type(error).__name__}: {first_line}"
        return [Measured(kernel, "launch", float("inf"), 0.0, reason) for kernel in check.kernels]


def _compile(checks: Checks) -> None:
    start = time.perf_counter()
    count = compile_launches(check.run for each in checks.values() for check in each)
    print(f"{count} kernels compiled on {cores()} cores in {time.perf_counter() - start:.0f} s", flush=True)


def _introduction(found: dict[str, Any], reason: str) -> list[str]:
    versions = {"fastkl": found["fastkl"], **found["versions"]}
    return [
        " · ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        f"device   {found['device']}",
        f"backend  {found['backend']}: {reason}",
        *(f"missing  {line}" for line in found["missing"]),
    ]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastkl.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="check this device; a GPU by default, if torch sees one"
    )
    parser.add_argument("--json", type=writable, metavar="FILE", help="write versions, errors and times to FILE")
    arguments = parser.parse_args(argv)
    seen = torch.cuda.is_available()
    if arguments.device == "cuda" and not seen:
        parser.error("argument --device: torch sees no CUDA or HIP device here; use --device cpu")
    arguments.device = arguments.device or ("cuda" if seen else "cpu")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
