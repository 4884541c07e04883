"""Runs one trainer, alone in its process: `python -m bench.integrations.process JOB.json RESULT.json`."""

from __future__ import annotations

import json
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from bench.integrations import Job, Kind, load
from bench.lib.measure import CLOCKS
from fastkl._check.json_file import write_json

UNRELATED = ("time", "per_second", "runtime", "flos")  # what a trainer logs of time


class Turns(TrainerCallback):
    """Puts the ways of a job in place in turn, one for each step, and measures the steps.

    Each round starts with another.
    """

    def __init__(self, kind: Kind, job: Job) -> None:
        self._kind, self._job, self._now = kind, job, CLOCKS[job.clock]
        self._place, self._start = ExitStack(), 0.0
        self.steps: list[dict[str, Any]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._place.enter_context(self._kind.within(self._way()))
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append({"way": self._way(), "seconds": self._now() - self._start})
        self._place.close()

    def _way(self) -> str:
        ways, step = self._job.ways, len(self.steps)
        return ways[(step + step // len(ways)) % len(ways)]


def run(job: Job) -> dict[str, Any]:
    kind = load(job.kind)
    trainer = kind.build(job)
    turns = Turns(kind, job)
    trainer.add_callback(turns)
    before = resident_bytes()
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    log = [
        {
            key: value
            for key, value in entry.items()
            if isinstance(value, float) and not any(w in key for w in UNRELATED)
        }
        for entry in trainer.state.log_history
    ]
    return {"steps": turns.steps, "extra_mb": (peak - before) / 1e6, "log": log}


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), run(Job(**json.loads(Path(sys.argv[1]).read_text()))))
