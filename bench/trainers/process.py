"""Measures one trainer, alone in its process: `python -m bench.trainers.process NAME JOB.json RESULT.json`.

RESULT.json holds the steps that are done, and more at the end.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from bench.lib.machine import describe_versions
from bench.trainers import Clock, Job, load
from fastkl._check.json_file import write_json


class RecordingClock(Clock):
    """Writes the steps down as they come."""

    def __init__(self, kind: str, file: Path) -> None:
        super().__init__(kind)
        self._file = file

    def end_step(self) -> None:
        super().end_step()
        write_json(self._file, {"steps": self.steps})


def main(name: str, job_file: str, result_file: str) -> None:
    job, trainer = Job(**json.loads(Path(job_file).read_text())), load(name)
    clock = RecordingClock(job.clock, Path(result_file))
    trainer.train(job, clock)
    if len(clock.steps) != job.steps:
        raise RuntimeError(f"{name} did {len(clock.steps)} steps instead of {job.steps}")
    on_gpu = job.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = describe_versions("transformers", "accelerate", *trainer.PACKAGES)
    result = {"steps": clock.steps, "peak_memory_mb": peak / 1e6, "versions": versions}
    write_json(Path(result_file), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
