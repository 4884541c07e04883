"""Commands run one after the other, each with a log and a time budget; one that fails does not stop the next."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["ok", "failed", "out of time", "skipped"]
WIDTH = 100  # of a line of output that is quoted


class Stage(NamedTuple):
    """A command whose last line of output says what came of it."""

    name: str
    command: list[str]
    budget: float  # seconds
    environment: Mapping[str, str] = {}  # beside the process's own
    skip: str = ""  # why it cannot run here
    refusal: str = ""  # a text in the output that means the same
    show: int = 0  # lines of output shown when it has ended


class Outcome(NamedTuple):
    stage: str
    status: Status
    seconds: float
    detail: str  # the last line of the output, or the reason


def run_stages(stages: Iterable[Stage], folder: Path) -> list[Outcome]:
    """Runs them in order, output in folder/NAME.log."""
    return [_run(stage, folder / f"{stage.name}.log") for stage in stages]


def table(outcomes: list[Outcome]) -> str:
    wide = max(len(o.stage) for o in outcomes)
    return "\n".join(f"{o.stage:{wide}}  {o.status:11}  {o.seconds:>5.0f} s  {o.detail}" for o in outcomes)


def _run(stage: Stage, log: Path) -> Outcome:
    if stage.skip:
        return Outcome(stage.name, "skipped", 0.0, stage.skip)
    print(f"{stage.name}: {' '.join(stage.command)}", flush=True)
    start = time.perf_counter()
    status = _call(stage, log)
    seconds = time.perf_counter() - start
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if status == "failed" and stage.refusal and stage.refusal in text:
        return Outcome(stage.name, "skipped", seconds, stage.refusal)
    print("\n".join(lines[-stage.show :] if stage.show else []), flush=True)
    return Outcome(stage.name, status, seconds, lines[-1].strip(" =")[:WIDTH] if lines else "no output")


def _call(stage: Stage, log: Path) -> Status:
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                stage.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.environment},
                start_new_session=True,  # its children end with it
            )
        except OSError as error:
            output.write(f"{error}\n")
            return "failed"
        try:
            return "ok" if process.wait(stage.budget) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
