"""Everything that needs a GPU, in one command with a budget of 8 minutes (9 with --wheels): `make gpu`.

    python3 -m bench gpu --out FOLDER [--wheels FOLDER] [--pair FOLDER]
    python3 -m bench gpu --out FOLDER --dry-run          the same stages on a CPU, with small shapes

    wheels      installs the wheels of --wheels into a new folder that the other stages see
    tests       the losses, kernels and training steps on the device
    memcheck    the Triton kernels under compute-sanitizer, where there is one
    losses      `bench models`: time, memory and error on the shapes of four models
    train       `bench train`: tokens per second and peak memory of `fastkl distill`

The folder receives a log of each stage, losses.json, train.json and summary.json. A stage that fails does not stop the
next; the exit status says at the end whether one did.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from bench.lib.report import circumstances, write_report
from bench.lib.stages import Stage, run_stages, table

ROOT = Path(__file__).parents[2]
TESTS = ("gpu/test_*.py", "**/test_*triton.py")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="put logs and JSON there; made if missing"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these wheels for the other stages")
    parser.add_argument("--pair", type=Path, metavar="FOLDER", help="give this pair to `bench train`")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, with small shapes")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.wheels is not None and not list(arguments.wheels.glob("*.whl")):
        parser.error(f"argument --wheels: no *.whl in {arguments.wheels}")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; use --dry-run to see whether the stages work")
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        outcomes = run_stages(_stages(arguments, out, site), out)
    device = "cpu" if arguments.dry_run else "cuda"
    stages = [outcome._asdict() for outcome in outcomes]
    write_report(out / "summary.json", {"stages": stages, **circumstances(device, "transformers", "accelerate")})
    print(f"\n{'dry run on a CPU; ' if arguments.dry_run else ''}logs and JSON in {out}\n{table(outcomes)}")
    if any(outcome.status not in ("ok", "skipped") for outcome in outcomes):
        sys.exit(1)


def _stages(arguments: argparse.Namespace, out: Path, site: str) -> list[Stage]:
    dry, bench = arguments.dry_run, [sys.executable, "-m", "bench"]
    device, small = "cpu" if dry else "cuda", ["--small"] * dry
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    shared = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "FASTKL_DRY_RUN": str(int(dry))}
    pair = [] if arguments.pair is None else ["--pair", str(arguments.pair)]
    losses = [*bench, "models", "--device", device, "--seconds", "150", "--json", str(out / "losses.json"), *small]
    train = [*bench, "train", "--device", device, "--json", str(out / "train.json"), *small, *pair]
    return [
        *_wheels(arguments.wheels, site),
        Stage("tests", [*_pytest(), "-m", "gpu or not slow", *_files(*TESTS)], 130, shared),
        _memcheck(shared, dry),
        Stage("losses", losses, 190, shared, show=200),
        Stage("train", train, 90, shared),
    ]


def _wheels(folder: Path | None, site: str) -> list[Stage]:
    if folder is None:
        return []
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--target", site]
    return [Stage("wheels", [*pip, *map(str, sorted(folder.glob("*.whl")))], 60)]


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]


def _files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in (ROOT / "tests").glob(pattern))


def _memcheck(shared: dict[str, str], dry: bool) -> Stage:
    """Widths that end within a block, and results in a wider buffer. Every tensor is an allocation of its own."""
    tool = next(filter(None, map(shutil.which, SANITIZER)), None)
    reason = "a dry run has no device" if dry else "no compute-sanitizer here" if tool is None else ""
    chosen = ["-k", "(test_widths and (1009 or 521)) or test_strides", *_files(TESTS[1])]
    return Stage(
        "memcheck",
        [tool or SANITIZER[0], "--tool", "memcheck", "--error-exitcode", "1", *_pytest(), *chosen],
        60,
        shared | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        skip=reason,
        refusal="Device not supported",
    )
