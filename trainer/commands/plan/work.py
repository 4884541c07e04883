"""The FLOPs of a step, phase by phase (docs/speed/accounting.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fastkl.trainer.commands.plan.run import Run
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.models.sizes.flops import cost_of, sampling_flops, scoring_flops, training_flops, without_adapter
from fastkl.trainer.objectives.registry import make_objective, teacher_passes

SAMPLING, PREPARING, UPDATE = "sampling", "the student's pass before the update", "the student's update"


class Work(NamedTuple):
    """A phase of a step."""

    name: str
    flops: float  # of all processes together


def work(run: Run) -> Iterator[Work]:
    """The phases that cost FLOPs, in their order."""
    cost, config = cost_of(run.student), run.config
    if isinstance(config, DistillConfig):
        yield Work(SAMPLING, sampling_flops(cost, run.typical))
        passes = teacher_passes(config.loss)
        for scorer in run.scorers:
            theirs = cost_of(scorer.model)
            theirs = without_adapter(theirs) if scorer.config.self == "base" else theirs
            yield Work(scorer.name, passes * scoring_flops(theirs, scorer.read(run.typical)))
        preparing = make_objective(config.loss, config.sampling, None).preparing_flops(cost, run.typical)
        if preparing:
            yield Work(PREPARING, preparing)
    yield Work(UPDATE, training_flops(cost, run.typical))
