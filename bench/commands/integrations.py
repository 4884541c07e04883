"""Training steps of Transformers' Trainer and of TRL's trainers, as they come and with fastkl under them.

    python -m bench integrations --json integrations.json
    python -m bench integrations --impl sft,distillation --rows 4 --tokens 256 --clock wall
    python -m bench integrations --small --impl transformers

All train a random Llama, SmolLM2's width and vocabulary (49152 × 576, tied) and four layers by default. The head weighs
more in it than in a deep model: `head_share` says how much. Each trainer runs in three processes, one after the other:

    seconds      one trainer takes its steps in turn as it comes, with fastkl, and with a head that costs nothing; medians
    head_share   1 − seconds without a head / seconds as it comes. The head of sampling is not in it
    extra_mb     peak resident memory beyond what was there before the first step, with gradients and AdamW's state
    difference   the largest |a − b| / max(1, |a|) of all numbers that are logged with fastkl and without, time left out
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.integrations import WAYS, Job
from bench.lib import arguments as checked
from bench.lib.pair import Size, make_pair
from bench.lib.report import circumstances
from fastkl._check.json_file import write_json

NAMES = ("sft", "distillation", "grpo", "transformers", "distillation_jsd", "dpo", "kto", "rloo")
FULL, SMALL = Size(49152, 576, 4), Size(300, 64, 1)
LOGGED_STEPS = 2  # of the runs for memory and logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    checked.add_names(parser, "--impl", "trainer", NAMES, "measure these")
    parser.add_argument("--small", action="store_true", help="make a tiny model, for a dry run")
    parser.add_argument("--layers", type=checked.positive, help=f"set the model's layers; {FULL.layers} by default")
    parser.add_argument("--rows", type=checked.positive, default=8, help="set the rows of a step, a multiple of 4")
    parser.add_argument("--tokens", type=checked.positive, default=64, help="set the tokens that a row trains on")
    parser.add_argument("--rounds", type=checked.positive, default=3, help="take medians over this many steps of each")
    parser.set_defaults(device="cpu")
    checked.add_clock(parser)
    checked.add_json(parser)


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if arguments.rows % 4:
        parser.error(
            f"argument --rows: {arguments.rows} is no multiple of 4, the completions of a prompt in GRPO and RLOO"
        )
    size = SMALL if arguments.small else FULL
    size = size._replace(layers=arguments.layers or size.layers)
    work = {"rows": arguments.rows, "tokens": arguments.tokens, "clock": arguments.clock}
    results: dict[str, dict[str, Any]] = {}
    report = {
        "trainers": results,
        "job": {**work, "rounds": arguments.rounds},
        "model": size._asdict(),
        **circumstances(arguments.device, "transformers", "accelerate", "trl"),
    }
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder, "pair"), size)
        for name in arguments.impl:
            job = Job(name, f"{folder}/pair", folder, list(WAYS), len(WAYS) * (1 + arguments.rounds), **work)
            results[name] = _measured(job)
            _show(name, results[name])
            write_json(arguments.json, report)
    if all("skipped" in result for result in results.values()):
        sys.exit(1)


def _measured(job: Job) -> dict[str, Any]:
    """What a report holds of one trainer."""
    try:
        turns = _process(job)
        alone = {
            way: _process(dataclasses.replace(job, ways=[way], steps=LOGGED_STEPS)) for way in ("theirs", "fastkl")
        }
    except RuntimeError as error:
        return {"skipped": str(error)}
    if any(entry.get("grad_norm") == 0.0 for entry in alone["theirs"]["log"]):
        return {"skipped": "a gradient of the trainer as it comes is 0: rows without a gradient cost less"}
    counted = turns["steps"][len(WAYS) :]  # the first round warms up
    seconds = {way: statistics.median(s["seconds"] for s in counted if s["way"] == way) for way in WAYS}
    return {
        "seconds": seconds,
        "head_share": 1 - seconds["none"] / seconds["theirs"],
        "extra_mb": {way: result["extra_mb"] for way, result in alone.items()},
        "difference": difference(alone["theirs"]["log"], alone["fastkl"]["log"]),
        "steps": turns["steps"],
        "losses": {way: [e["loss"] for e in result["log"] if "loss" in e] for way, result in alone.items()},
    }


def difference(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """The largest |a − b| / max(1, |a|) of two logs; infinite if they do not hold the same."""
    if [entry.keys() for entry in theirs] != [entry.keys() for entry in ours]:
        return float("inf")
    pairs = ((a[key], b[key]) for a, b in zip(theirs, ours, strict=True) for key in a)
    return max(abs(x - y) / max(1.0, abs(x)) for x, y in pairs)


def _process(job: Job) -> dict[str, Any]:
    """What `bench.integrations.process` writes. Raises RuntimeError with the last line that it said."""
    job_file, result_file = Path(job.folder, "job.json"), Path(job.folder, "result.json")
    job_file.write_text(json.dumps(dataclasses.asdict(job)))
    command = [sys.executable, "-m", "bench.integrations.process", str(job_file), str(result_file)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def _show(name: str, result: dict[str, Any]) -> None:
    if "skipped" in result:
        print(f"{name}: skipped: {result['skipped']}")
        return
    seconds, memory = result["seconds"], result["extra_mb"]
    print(
        f"{name}: {seconds['theirs']:.2f} s a step, {seconds['fastkl']:.2f} with fastkl: "
        f"{seconds['theirs'] / seconds['fastkl']:.2f} times as fast; the head takes {result['head_share']:.0%}; "
        f"{memory['theirs']:,.0f} MB, {memory['fastkl']:,.0f} with fastkl; logs differ by {result['difference']:.1e}",
        flush=True,
    )
