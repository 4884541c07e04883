"""Measures one trainer, alone in its process: `python -m bench.trainers.process NAME JOB.json RESULT.json`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from bench.lib.machine import describe_versions
from bench.trainers import Clock, Job, load


def main(name: str, job_file: str, result_file: str) -> None:
    job, trainer = Job(**json.loads(Path(job_file).read_text())), load(name)
    clock = Clock(job.clock)
    trainer.train(job, clock)
    if len(clock.steps) != job.steps:
        raise RuntimeError(f"{name} did {len(clock.steps)} steps instead of {job.steps}")
    on_gpu = job.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = describe_versions("transformers", "accelerate", *trainer.PACKAGES)
    result = {"steps": clock.steps, "peak_memory_mb": peak / 1e6, "versions": versions}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
