"""`fastkl distill` that samples by `generate`, as TRL's two do, with their objective."""

from __future__ import annotations

from bench.trainers import Clock, Job, fastkl

PACKAGES = fastkl.PACKAGES


def train(job: Job, clock: Clock) -> None:
    fastkl.train(job, clock, loss__objective="reverse_kl", sampling__engine="generate")
