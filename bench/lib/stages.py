"""Commands run one after the other within one budget; one that fails does not stop the next.

A stage may use its own budget and whatever those before it have left. What is known is written down at once: the output to
log.txt, what came of each stage to a JSON file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

Status = Literal["running", "ok", "failed", "out of time", "skipped"]
WIDTH = 100  # of a line of output that is quoted
SECONDS = "{seconds}"  # in a command: the time that the stage has, less what its last piece of work may take
LAST_PIECE = 0.1  # of the stage's time


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


def run_stages(
    stages: Iterable[Stage], folder: Path, known: Callable[[list[Outcome]], object] = lambda _: None
) -> list[Outcome]:
    """Runs them in order, all output in folder/log.txt; `known` is told of each beginning and each end."""
    outcomes: list[Outcome] = []
    deadline, log = time.perf_counter(), folder / "log.txt"
    log.write_bytes(b"")
    for stage in stages:
        deadline += 0.0 if stage.skip else stage.budget
        known([*outcomes, Outcome(stage.name, "running", 0.0, "")])
        outcomes.append(_run(stage, deadline - time.perf_counter(), log))
        known(outcomes)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    wide = max(len(o.stage) for o in outcomes)
    return "\n".join(f"{o.stage:{wide}}  {o.status:11}  {o.seconds:>5.0f} s  {o.detail}" for o in outcomes)


def _run(stage: Stage, seconds: float, log: Path) -> Outcome:
    if stage.skip:
        return Outcome(stage.name, "skipped", 0.0, stage.skip)
    command = [part.replace(SECONDS, f"{(1 - LAST_PIECE) * seconds:.0f}") for part in stage.command]
    title = f"{stage.name}, at most {seconds:.0f} s: {' '.join(command)}"
    print(title, flush=True)
    begin, start = log.stat().st_size, time.perf_counter()
    status = _call(stage._replace(command=command), seconds, log, f"\n=== {title}\n")
    taken = time.perf_counter() - start
    with log.open("rb") as output:
        output.seek(begin)
        text = output.read().decode(errors="replace").partition("=== ")[2].partition("\n")[2]
    lines = [line for line in text.splitlines() if line.strip()]
    if status == "failed" and stage.refusal and stage.refusal in text:
        return Outcome(stage.name, "skipped", taken, stage.refusal)
    print("\n".join(lines[-stage.show :] if stage.show else []), flush=True)
    return Outcome(stage.name, status, taken, lines[-1].strip(" =")[:WIDTH] if lines else "no output")


def _call(stage: Stage, seconds: float, log: Path, title: str) -> Status:
    with log.open("a") as output:
        output.write(title)
        output.flush()
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
            return "ok" if process.wait(max(0.0, seconds)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what a stage that ended has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
