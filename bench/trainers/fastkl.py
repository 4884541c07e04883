"""`fastkl distill`: the policy gradient on the sampled tokens' reverse KL."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from bench.trainers import PHASES, Clock, Job

PACKAGES = ("peft",)


def train(job: Job, clock: Clock, **options: str) -> None:
    """`options`: further settings of the run, such as loss__objective."""
    from fastkl import cli
    from fastkl.trainer import distill, loop

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

    class StepClock(loop.Clock):
        """The run's own, and the bench's beside it."""

        @contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with super().__call__(phase), clock(phase) if phase in PHASES[:2] else nullcontext():
                yield

    with (
        mock.patch.object(distill, "end_of_sequence", return_value=[]),
        mock.patch.object(loop, "Clock", StepClock),
        mock.patch.object(loop.ProgressBar, "step", lambda *_: clock.end_step()),  # noqa: PT008
    ):
        status = cli.main(["distill", *(f"--{name}={value}" for name, value in settings.items())])
    if status:
        sys.exit(status)
