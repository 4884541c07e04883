"""On-policy distillation on a pair of models: seconds per step by phase, tokens per second, peak memory.

    python -m bench train --device cuda --json train.json
    python -m bench train --pair runs/smollm2 --json train.json        teacher/, student/ and prompts.jsonl are there
    python -m bench train --device cpu --pair runs/smollm2 --impl fastkl,trl_distillation --prompts 8 --new-tokens 24

Without --pair one is generated: a random Llama with a vocabulary of Qwen3's size as the teacher, the same with noise on its
weights as the student, and prompts of random words. The speed is that of a real run; what is learned means nothing.
Every trainer does the same work (bench/trainers/) in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench import trainers
from bench.lib import arguments as checked
from bench.lib.pair import Size, make_pair
from bench.lib.report import circumstances
from bench.trainers import PHASES, Job
from fastkl._check.json_file import write_json


class Work(NamedTuple):
    """How much there is to do."""

    prompts: int  # per step
    new_tokens: int
    steps: int


class Preset(NamedTuple):
    """A pair to generate and the work on it."""

    pair: Size
    work: Work


POLL = 0.5  # seconds between two looks at what a trainer has done

FULL = Preset(Size(151936, 1024, 12), Work(64, 128, 6))
SMALL = Preset(Size(300, 64, 2), Work(8, 12, 3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=checked.device, default="cuda", metavar="{cpu,cuda}", help="say what the figures are of"
    )
    checked.add_names(parser, "--impl", "trainer", trainers.names(), "measure these", default=["fastkl"])
    parser.add_argument(
        "--pair", type=Path, metavar="FOLDER", help="use the teacher/, student/ and prompts.jsonl there"
    )
    parser.add_argument("--small", action="store_true", help="make a tiny pair and a short run, for a dry run")
    parser.add_argument("--prompts", type=checked.positive, help="set the prompts of a step, the same ones in each")
    parser.add_argument("--new-tokens", type=checked.positive, help="set the tokens of each completion")
    parser.add_argument("--steps", type=checked.positive, help="set the steps; the first one warms up")
    checked.add_clock(parser)
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    checked.check_clock(arguments, parser)
    if arguments.steps == 1:
        parser.error("argument --steps: 1 is too few, for the first step only warms up; use at least 2")
    preset = SMALL if arguments.small else FULL
    options = {name: value for name in Work._fields if (value := getattr(arguments, name)) is not None}
    work = preset.work._replace(**options)
    with tempfile.TemporaryDirectory() as folder:
        pair = _prepare(Path(folder), arguments.pair, preset.pair, work.prompts)
        job = Job(str(pair), folder, arguments.device, *work, arguments.clock)
        results: dict[str, dict[str, Any]] = {}
        report = {
            "trainers": results,
            "job": {name: value for name, value in vars(job).items() if name not in ("pair", "folder")},
            "pair": "generated" if arguments.pair is None else str(arguments.pair),
            **circumstances(arguments.device, "transformers", "accelerate"),
        }
        write_json(arguments.json, report)
        for name in arguments.impl:
            known = functools.partial(_record, arguments.json, report, name)
            known(_measure(name, job, known))
    _show(results)
    if all("skipped" in result for result in results.values()):
        sys.exit(1)


def _prepare(folder: Path, source: Path | None, size: Size, prompts: int) -> Path:
    """A folder with the pair, generated unless there is a source, and exactly the prompts of one step."""
    pair = folder / "pair"
    if source is None:
        make_pair(pair, size)
        source = pair
    else:
        pair.mkdir()
        for name in ("teacher", "student"):
            (pair / name).symlink_to((source / name).resolve())
    lines = (source / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:prompts]
    (pair / "prompts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return pair


def _record(file: Path | None, report: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    report["trainers"][name] = result
    write_json(file, report)


def _measure(name: str, job: Job, known: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Medians over the steps after the first, which warms up; or why there are none.

    Meanwhile `known` is told of the steps that are done.
    """
    folder = Path(job.folder, name)
    folder.mkdir()
    job_file, result_file = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, folder=str(folder)))))
    process = [sys.executable, "-m", "bench.trainers.process", name, str(job_file), str(result_file)]
    with (folder / "errors.txt").open("w+") as errors:
        running = subprocess.Popen(process, stdout=sys.stderr, stderr=errors)
        while running.poll() is None:
            time.sleep(POLL)
            if result_file.exists():
                known(json.loads(result_file.read_text()))
        errors.seek(0)
        said = errors.read()
    shutil.rmtree(folder / "run", ignore_errors=True)
    if running.returncode != 0:
        print(said, file=sys.stderr)
        return {"skipped": (said.strip().splitlines() or [f"exit status {running.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(result_file.read_text())
    counted = result["steps"][1:]
    seconds = {phase: statistics.median(step.get(phase, 0.0) for step in counted) for phase in ("total", *PHASES)}
    tokens = job.prompts * job.new_tokens
    return {"seconds": seconds, "sampled_tokens_per_second": tokens / seconds["total"], **result}


def _show(results: dict[str, dict[str, Any]]) -> None:
    """Ratios are to the first trainer that ran."""
    base = next((result["seconds"]["total"] for result in results.values() if "seconds" in result), 1.0)
    for name, result in results.items():
        if "skipped" in result:
            print(f"{name}: skipped: {result['skipped']}")
            continue
        seconds = result["seconds"]
        phases = ", ".join(f"{phase} {seconds[phase]:.2f}" for phase in PHASES)
        print(
            f"{name}: {seconds['total']:.2f} s per step ({phases}), {seconds['total'] / base:.2f} times the first, "
            f"{result['sampled_tokens_per_second']:,.0f} sampled tokens/s, peak {result['peak_memory_mb']:,.0f} MB"
        )
