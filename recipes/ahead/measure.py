"""What `sampling.steps_ahead` costs and brings, on a CPU, with server.py in the place of vLLM, or with vLLM.

    python recipes/ahead/measure.py overlap       # seconds of a step, where sampling and training take set times
    python recipes/ahead/measure.py learning      # teacher_kl and accuracy at 0, 1, 4 steps ahead, two rates, three seeds
    FASTKL_VLLM=vv/bin/python python recipes/ahead/measure.py vllm      # seconds of a step with vLLM, twice

The models are the demo's (`make demo`); those of `vllm` are SmolLM2's (`recipes/smollm2/make.py`). Runs are kept in
runs/ahead: what is complete is not run again. The results are written beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate.state import AcceleratorState
from server import Model
from vllm_server import STUDENT as VLLM_STUDENT
from vllm_server import serving_alone

from fastkl._check.machine import cpu_model, versions
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.distill import distill
from fastkl.trainer.runs.files import read_jsonl, write_text
from fastkl.trainer.runs.listener import SILENT, Listener
from fastkl.trainer.servers import connection
from fastkl.trainer.servers.transport import Answer

HERE, RUNS = Path(__file__).parent, Path("runs/ahead")
STUDENT = Path("runs/demo/student/student")
AHEAD, SEEDS, RATES = (0, 1, 4), (1, 2, 3), (1e-3, 2.5e-4)
LAST = 10  # steps whose mean is where a run ends
TIMES = ((8.0, 4.0), (4.0, 8.0))  # seconds of sampling, of training
STEPS, SKIPPED = 7, 2  # of a run that is timed; the first of them fill the queue
DEMO, WITH_VLLM = HERE / "distill.yaml", HERE / "vllm.yaml"
ROUNDS = (1, 2)  # of runs, so that the machine's load shows
TIMED: dict[str, Any] = {"optim.steps": STEPS, "eval.data.path": "null", "sampling.prompts_per_step": 8}


class Slow(Listener):
    """Training takes so many seconds more, and every step is timed."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.ends = seconds, list[float]()

    @contextmanager
    def _sleeping(self) -> Iterator[None]:
        time.sleep(self._seconds)
        yield

    def on_phase(self, phase: str) -> AbstractContextManager[None]:
        return self._sleeping() if phase == "train" else super().on_phase(phase)

    def on_step(self, step: int, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def overlap() -> Iterator[dict[str, Any]]:
    """A row for each pair of times and each number of steps ahead."""
    for sampling, training in TIMES:
        for ahead in (0, 1):
            folder, slow = RUNS / f"overlap-{sampling:g}-{training:g}-{ahead}", Slow(training)
            if not (folder / "ends.json").exists():
                with serving(sampling) as url:
                    train(words(folder, url, ahead, 0, **TIMED), slow)
                write_text(folder / "ends.json", json.dumps(slow.ends))
            ends = json.loads((folder / "ends.json").read_text())
            seconds = (ends[-1] - ends[SKIPPED - 1]) / (len(ends) - SKIPPED)
            rows = read_jsonl(folder / "metrics.jsonl")[SKIPPED:]
            phases = {name: fmean(row[f"time/{name}"] for row in rows) for name in ("push_weights", "teacher", "ranks")}
            yield {"sampling": sampling, "training": training, "steps_ahead": ahead, "seconds": seconds, **phases}


def vllm() -> Iterator[dict[str, Any]]:
    """A row for each round and each number of steps ahead: medians of seconds, and the machine's load."""
    folders = {(turn, ahead): RUNS / f"vllm-{turn}-{ahead}" for turn in ROUNDS for ahead in (0, 1)}
    missing = {case: folder for case, folder in folders.items() if not (folder / "ends.json").exists()}
    if missing:
        (RUNS / "vllm").mkdir(parents=True, exist_ok=True)
        with serving_alone(os.environ["FASTKL_VLLM"], RUNS / "vllm") as url:
            for (_, ahead), folder in missing.items():
                timed = Slow(0.0)
                train(words(folder, url, ahead, 0, WITH_VLLM), timed)
                write_text(folder / "ends.json", json.dumps({"ends": timed.ends, "load": os.getloadavg()[1]}))
    for (turn, ahead), folder in folders.items():
        yield {"round": turn, "steps_ahead": ahead, **parts_of_step(folder)}


def parts_of_step(folder: Path) -> dict[str, float]:
    """Medians of a run's seconds: of a step, and of what it is made of."""
    told = json.loads((folder / "ends.json").read_text())
    rows = read_jsonl(folder / "metrics.jsonl")[SKIPPED:]
    steps = [end - start for start, end in itertools.pairwise(told["ends"][SKIPPED - 1 :])]
    waited, pushes = ([row[f"time/{name}"] for row in rows] for name in ("sample", "push_weights"))
    written = [row.get("time/rollouts", row["time/sample"]) for row in rows]
    rest = [step - wait - push for step, wait, push in zip(steps, waited, pushes, strict=True)]
    columns = {"seconds": steps, "waited": waited, "sampling": written, "push": pushes, "training": rest}
    return {**{name: median(values) for name, values in columns.items()}, "steps": len(steps), "load": told["load"]}


def learning() -> Iterator[dict[str, Any]]:
    """A row for each learning rate, seed and number of steps ahead."""
    for rate, seed, ahead in itertools.product(RATES, SEEDS, AHEAD):
        folder = RUNS / f"learning-{rate:g}-{ahead}-{seed}"
        if not (folder / "report.html").exists():
            with in_process():
                train(words(folder, "http://in.process/v1", ahead, seed, **{"optim.lr": rate}))
        yield {"rate": rate, "steps_ahead": ahead, "seed": seed, **ending(read_jsonl(folder / "metrics.jsonl"))}


def ending(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Where a run begins and ends, and how far its samples are from the student that learns from them."""
    kls = [row["teacher_kl"] for row in rows if "teacher_kl" in row]
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    return {
        "before": accuracies[0],
        "accuracy": accuracies[-1],
        "teacher_kl": fmean(kls[-LAST:]),
        "mismatch": fmean(row["sampler_mismatch/mean_abs"] for row in rows[1:]),
        "ratio_max": max(row["policy/ratio_max"] for row in rows[1:]),
    }


def train(line: list[str], listener: Listener = SILENT) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a run after another in one process
    distill(parse(line)[1], listener=listener)


@contextmanager
def in_process() -> Iterator[None]:
    """While open, a server's answers come without a network: on a CPU, HTTP would take longer than all the rest."""
    model, exchange = Model(STUDENT), connection.exchange

    def answered(url: str, body: dict[str, Any], *_: Any, **__: Any) -> Answer:
        status, answer = model.answer("/" + url.split("/", 3)[3], body)
        return Answer(status, {}, json.dumps(answer).encode())

    connection.exchange = answered
    try:
        yield
    finally:
        connection.exchange = exchange


@contextmanager
def serving(seconds: float) -> Iterator[str]:
    """The address of a server of its own that holds completions back so long."""
    command = [sys.executable, str(HERE / "server.py"), str(STUDENT), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def words(folder: Path, url: str, ahead: int, seed: int, config: Path = DEMO, **more: Any) -> list[str]:
    """The command line of a run."""
    settings = {"run": folder, "seed": seed, "sampling.server.url": url, "sampling.steps_ahead": ahead, **more}
    return ["distill", str(config), *(f"--{name}={value}" for name, value in settings.items())]


def write_report(name: str, rows: list[dict[str, Any]]) -> None:
    report = {
        "rows": rows,
        "machine": {"cpu": cpu_model(), "threads": 1},
        "versions": versions("fastkl", "transformers"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text(HERE / f"{name}.json", json.dumps(report, indent=1) + "\n")


PARTS = {"overlap": overlap, "learning": learning, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(PARTS), help="measure this")
    what = parser.parse_args().what
    student, made_by = (VLLM_STUDENT, "recipes/smollm2/make.py") if what == "vllm" else (STUDENT, "`make demo`")
    if not student.exists():
        sys.exit(f"{student} is not there: run {made_by} first")
    if what == "vllm" and not os.environ.get("FASTKL_VLLM"):
        sys.exit("FASTKL_VLLM is unset: set it to the Python of an environment with vLLM (docs/teachers/servers.md)")
    torch.set_num_threads(1)
    rows = []
    for row in PARTS[what]():
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_report(name=what, rows=rows)


if __name__ == "__main__":
    main()
