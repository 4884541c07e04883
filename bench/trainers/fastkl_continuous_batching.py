"""`fastkl distill` that samples by continuous batching on any device, with the objective of TRL's two."""

from __future__ import annotations

from bench.trainers import Clock, Job, fastkl

PACKAGES = fastkl.PACKAGES


def train(job: Job, clock: Clock) -> None:
    fastkl.train(job, clock, loss__objective="reverse_kl", sampling__engine="continuous_batching")
