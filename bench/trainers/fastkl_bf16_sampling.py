"""`fastkl distill` that samples from a copy of the student in bfloat16."""

from __future__ import annotations

from bench.trainers import Clock, Job, fastkl

PACKAGES = fastkl.PACKAGES


def train(job: Job, clock: Clock) -> None:
    fastkl.train(job, clock, sampling__dtype="bfloat16")
