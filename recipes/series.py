"""Series of runs: commands of `fastkl`, each in a process of its own or all in this one, and one report of them all.

The figures of a run are in its folder. A run whose figures are there is not run again. One that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastkl._check.machine import cpu_model, versions
from fastkl.trainer.commands.command_line import load, parse
from fastkl.trainer.runs.files import read_jsonl, write_text

Row = dict[str, Any]


def threads() -> int:
    """Of each process of a series: what OMP_NUM_THREADS says, else one, since small models leave nothing for a second."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def words(command: str, config: Path, settings: Mapping[str, object]) -> list[str]:
    """The command line of `fastkl`: a config and what differs from it."""
    return [command, str(config), *(text for name, value in settings.items() for text in (f"--{name}", str(value)))]


def fastkl(command: str, config: Path, run: Path, settings: Mapping[str, object]) -> None:
    """Runs, or resumes, a run; nothing where its student is saved. What it says is in RUN.log."""
    if (run / "student" / "config.json").exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    said = run.with_name(f"{run.name}.log")
    line = [sys.executable, "-m", "fastkl.cli", *words(command, config, {"run": run, **settings})]
    with said.open("a", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1"}
        if subprocess.run(line, env=environment, stdout=log, stderr=log, check=False).returncode:
            sys.exit(f"{' '.join(line)}\nfailed; the end of {said} says why")


def here(command: str, config: Path, said: Path, settings: Mapping[str, object]) -> Any:
    """What a command returns, run in this process: one of its own takes seconds to start. What it says is in SAID."""
    name, given = parse(words(command, config, settings))
    said.parent.mkdir(parents=True, exist_ok=True)
    with said.open("a", encoding="utf-8") as log, redirect_stderr(log), redirect_stdout(log):
        return load(name)(given)


def run_here(command: str, config: Path, run: Path, settings: Mapping[str, object]) -> None:
    """As `fastkl`, in this process."""
    if not (run / "student" / "config.json").exists():
        here(command, config, run.with_name(f"{run.name}.log"), {"run": run, **settings})


def once(folder: Path, measure: Callable[[], Row]) -> Row:
    """The figures in FOLDER/result.json, which are measured if they are not there."""
    path = folder / "result.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(measure(), indent=1) + "\n")
        print(path, flush=True)
    found: Row = json.loads(path.read_text(encoding="utf-8"))
    return found


def total_flops(run: Path) -> float:
    """Of sampling, teacher and training, over all steps."""
    rows = read_jsonl(run / "metrics.jsonl")
    return sum(value for row in rows for name, value in row.items() if name.startswith("flops/"))


def accuracies(run: Path) -> list[float]:
    """On held-out problems: before the first step, and at each evaluation."""
    return [row["eval/accuracy"] for row in read_jsonl(run / "metrics.jsonl") if "eval/accuracy" in row]


def write_report(path: Path, runs: Iterable[Row], indent: int | None = 1) -> None:
    """The figures of all runs, and what they were made on."""
    report = {
        "runs": list(runs),
        "machine": {"cpu": cpu_model(), "threads": threads()},
        "versions": versions("fastkl", "transformers"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_text(path, json.dumps(report, indent=indent) + "\n")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
