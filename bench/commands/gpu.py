"""Everything that needs a GPU, in one command with a budget of 8 minutes (9 with --wheels): `make gpu`.

    python3 -m bench gpu --out FOLDER [--wheels FOLDER] [--cache FOLDER] [--pair FOLDER]
    python3 -m bench gpu --out FOLDER --dry-run              the same stages on a CPU, with small shapes
    python3 -m bench gpu --make-cache FOLDER --arch sm_90    compiles kernels, on a machine that needs no GPU

    wheels      installs the wheels of --wheels into a new folder that the other stages see
    smoke       `python -m fastkl.check`: each kernel and each loss against float64, and how long a loss takes
    losses      `bench models`: time, memory and error on the shapes of four models, beside the peers
    train       `bench train`: tokens per second and peak memory of `fastkl distill`
    tests       the losses, kernels and training steps on the device, on several cores at once
    memcheck    the Triton kernels under compute-sanitizer, where there is one

Each stage has a budget; what it leaves is the next one's. A stage that fails does not stop the next; the exit status says
at the end whether one did. FOLDER receives summary.json, log.txt, smoke.json, losses.json, train.json and tests.json. All
are whole at any time: a run that is cut off leaves what it had.

Kernels are compiled by the stage that first needs them, on all cores, unless --cache has them. That folder is made with the
same build of Triton (its version, for the same Python) from the same sources. What differs is compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.lib.report import circumstances
from bench.lib.stages import SECONDS, Outcome, Stage, run_stages, table
from fastkl._check.compiling import cores
from fastkl._check.json_file import write_json

ROOT = Path(__file__).parents[2]
TESTS = ("gpu/test_*.py", "**/test_*triton.py")
SANITIZER = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
WORKER_BYTES = 12 * 2**30  # of a GPU's memory that each process of tests may take
MOST_WORKERS = 12
PATIENCE = 3  # times the budget that a dry run has: nobody waits for a device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="put the log and JSON there; made if missing")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these wheels for the other stages")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="start from these compiled kernels")
    parser.add_argument("--pair", type=Path, metavar="FOLDER", help="give this pair to `bench train`")
    parser.add_argument("--dry-run", action="store_true", help="run on a CPU, with small shapes")
    parser.add_argument(
        "--make-cache", type=Path, metavar="FOLDER", help="compile kernels into FOLDER, and do nothing else"
    )
    parser.add_argument("--arch", default="sm_90", metavar="CHIP", help="compile them for this chip (default: sm_90)")


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.make_cache is not None:
        _make_cache(arguments, parser)
        return
    _check(arguments, parser)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    fixed = circumstances("cpu" if arguments.dry_run else "cuda", "transformers", "accelerate")

    def known(outcomes: list[Outcome]) -> None:
        write_json(out / "summary.json", {"stages": [outcome._asdict() for outcome in outcomes], **fixed})

    with tempfile.TemporaryDirectory() as scratch, _ends_by_sigterm():
        if arguments.cache is not None:
            fixed["kernels"] = _install_cache(arguments.cache, Path(scratch, "triton"))
        outcomes = run_stages(_stages(arguments, out, Path(scratch)), out, known)
    print(f"\n{'dry run on a CPU; ' if arguments.dry_run else ''}log and JSON in {out}\n{table(outcomes)}")
    if any(outcome.status not in ("ok", "skipped") for outcome in outcomes):
        sys.exit(1)


@contextmanager
def _ends_by_sigterm() -> Iterator[None]:
    """The stage that runs ends too, and the scratch folder goes."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.out is None:
        parser.error("argument --out: it is missing; name a folder for the log and JSON")
    for name, wanted in (("wheels", "*.whl"), ("cache", "kernels.json")):
        folder = getattr(arguments, name)
        if folder is not None and not list(folder.glob(wanted)):
            parser.error(f"argument --{name}: no {wanted} in {folder}")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; use --dry-run to see whether the stages work")


def _make_cache(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from bench.lib import kernel_cache  # imported here, as below: Triton exists on Linux only
    from bench.variants.aot import CHIPS

    chip = arguments.arch
    if chip not in CHIPS:
        parser.error(f"argument --arch: unknown chip {chip!r}; use one of {', '.join(CHIPS)}")
    if arguments.make_cache.exists() and any(arguments.make_cache.iterdir()):
        parser.error(f"argument --make-cache: {arguments.make_cache} is not empty; name a new folder")
    count = kernel_cache.make(arguments.make_cache, chip)
    print(f"{count} kernels for {chip} in {arguments.make_cache}; they are for this build of Triton alone")


def _install_cache(folder: Path, place: Path) -> str:
    from bench.lib import kernel_cache

    line = kernel_cache.install(folder.absolute(), place)
    print(line, flush=True)
    return line


def _stages(arguments: argparse.Namespace, out: Path, scratch: Path) -> list[Stage]:
    dry, python = arguments.dry_run, [sys.executable, "-m"]
    device, small, site = "cpu" if dry else "cuda", ["--small"] * dry, str(scratch / "site")
    shared = {
        "PYTHONPATH": os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "FASTKL_DRY_RUN": str(int(dry)),
        **({} if arguments.cache is None else {"TRITON_CACHE_DIR": str(scratch / "triton")}),
    }
    pair = [] if arguments.pair is None else ["--pair", str(arguments.pair)]
    smoke = [*python, "fastkl.check", "--device", device, "--json", str(out / "smoke.json")]
    losses = [*python, "bench", "models", "--device", device, "--seconds", SECONDS, "--json", str(out / "losses.json")]
    train = [*python, "bench", "train", "--device", device, "--json", str(out / "train.json")]
    tests = [*_pytest("-p", "bench.lib.pytest_record"), *_workers(dry), "-m", "gpu or not slow", *_files(*TESTS)]
    stages = [
        *_wheels(arguments.wheels, site),
        Stage("smoke", smoke, 60, shared, show=200),
        Stage("losses", [*losses, *small], 170, shared, show=200),
        Stage("train", [*train, *small, *pair], 90, shared),
        Stage("tests", tests, 110, shared | {"BENCH_TESTS_JSON": str(out / "tests.json")}),
        _memcheck(shared, dry),
    ]
    return [stage._replace(budget=stage.budget * (PATIENCE if dry else 1)) for stage in stages]


def _wheels(folder: Path | None, site: str) -> list[Stage]:
    if folder is None:
        return []
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--target", site]
    return [Stage("wheels", [*pip, *map(str, sorted(folder.glob("*.whl")))], 60)]


def _pytest(*options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *options]


def _workers(dry: bool) -> list[str]:
    """Processes that test at once: each compiles what it needs, and they share the GPU's memory."""
    if dry or importlib.util.find_spec("xdist") is None:
        return []
    room = torch.cuda.get_device_properties(0).total_memory // WORKER_BYTES
    return ["--numprocesses", str(max(1, min(cores(), room, MOST_WORKERS))), "--dist", "worksteal"]


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
        50,
        shared | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        skip=reason,
        refusal="Device not supported",
    )
