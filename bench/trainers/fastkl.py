"""`fastkl distill`: the policy gradient on the sampled tokens' reverse KL."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from bench.trainers import PHASES, Clock, Job
from fastkl.trainer import distill
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.runs.listener import Listener

PACKAGES = ("peft",)


class Timing(Listener):
    """Tells the bench's clock when a phase begins and ends, and when a step is done."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_phase(self, phase: str) -> AbstractContextManager[None]:
        return self._clock(phase) if phase in PHASES[:2] else nullcontext()

    def on_step(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        self._clock.end_step()


def train(job: Job, clock: Clock, **options: str) -> None:
    """`options`: further settings of the run, such as loss__objective."""
    settings: dict[str, Any] = {
        "run": f"{job.folder}/run",
        "student.path": f"{job.pair}/student",
        "teacher.path": f"{job.pair}/teacher",
        "data.path": f"{job.pair}/prompts.jsonl",
        "sampling.prompts_per_step": job.prompts,
        "sampling.max_new_tokens": job.new_tokens,
        "optim.steps": job.steps,
        "optim.lr": job.lr,
        "mixed_precision": "bf16" if job.device == "cuda" else "no",
        "checkpoint.every": 0,
        "log_samples": 0,  # their ranks are no part of the others' work
        **{name.replace("__", "."): value for name, value in options.items()},
    }
    _, config = parse(["distill", *(f"--{name}={value}" for name, value in settings.items())])
    with mock.patch.object(distill, "end_of_sequence", return_value=[]):  # no token ends a completion
        distill.distill(config, listener=Timing(clock))
