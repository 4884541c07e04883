"""`fastkl distill` with the objective of TRL's two: the reverse KL over the whole vocabulary."""

from __future__ import annotations

from bench.trainers import Clock, Job, fastkl

PACKAGES = fastkl.PACKAGES


def train(job: Job, clock: Clock) -> None:
    fastkl.train(job, clock, loss__objective="reverse_kl")
