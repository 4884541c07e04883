"""What to change first where a run does not fit: each change is tried on the plan; harmless ones come first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from fastkl.trainer.commands.plan.parts import Memory, is_sampled
from fastkl.trainer.commands.plan.run import Run
from fastkl.trainer.config.sampling import SamplingServerConfig
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.models.loading import outline_of_student
from fastkl.trainer.rollouts.samplers.in_progress import USUAL

SAMPLING_SERVER = SamplingServerConfig(url="http://127.0.0.1:8001/v1", model="student")
WORTH = 0.01  # of the peak: what saves less is not named
MOST_PROCESSES = 1024


class Advice(NamedTuple):
    """A change, and the peak once it and those before it are made."""

    words: str
    peak: float


def advice(run: Run, room: float) -> Iterator[Advice]:
    """Changes until the run fits into so many bytes, or no more are known."""
    peak = Memory(run).peak
    for change in (_smaller_batches, _checkpointing, _fewer_completions, _sampling_server, _teacher_server, _shards):
        if peak <= room:
            return
        made = change(run, room)
        if made is None:
            continue
        words, other = made
        found = Memory(other).peak
        if found < (1 - WORTH) * peak:
            run, peak = other, found
            yield Advice(words, peak)


def _smaller_batches(run: Run, room: float) -> tuple[str, Run]:
    """Down to what the longest sample needs; the same results, in more passes."""
    tokens, longest = run.config.batch.max_tokens, max(len(sample.ids) for sample in run.samples)
    while Memory(run).peak > room and tokens > longest:
        tokens = max(tokens // 2, longest)
        run = _with(run, batch=dataclasses.replace(run.config.batch, max_tokens=tokens))
    return f"batch.max_tokens {tokens}, which changes no result", run


def _checkpointing(run: Run, room: float) -> tuple[str, Run] | None:
    if run.config.student.gradient_checkpointing:
        return None
    student = dataclasses.replace(run.config.student, gradient_checkpointing=True)
    changed = _with(run, student=student)
    return (
        "student.gradient_checkpointing true, which changes no result and costs a forward pass",
        changed._replace(student=outline_of_student(student)),
    )


def _fewer_completions(run: Run, room: float) -> tuple[str, Run] | None:
    """Only as far as sampling is the peak."""
    if not isinstance(run.config, DistillConfig) or run.config.sampling.server.url:
        return None
    requests, start = run.config.sampling.max_requests or USUAL, run
    while requests > 1 and (memory := Memory(run)).peak > room and memory.largest.name == "sampling":
        requests //= 2
        run = _with(run, sampling=dataclasses.replace(run.config.sampling, max_requests=requests))
    return None if run is start else (f"sampling.max_requests {requests}, which samples longer", run)


def _sampling_server(run: Run, room: float) -> tuple[str, Run] | None:
    if not isinstance(run.config, DistillConfig) or run.config.sampling.server.url:
        return None
    sampling = dataclasses.replace(
        run.config.sampling, engine="auto", max_batch_tokens=512, max_requests=None, dtype=None, server=SAMPLING_SERVER
    )
    return "sampling.server: another device samples (docs/teachers/servers.md)", _with(run, sampling=sampling)


def _teacher_server(run: Run, room: float) -> tuple[str, Run] | None:
    """A teacher of its own weights, where the objective can ask a server."""
    own = [scorer for scorer in run.scorers if scorer.config.self is None and scorer.role == "teacher"]
    if not own or not is_sampled(run.config):
        return None
    return (
        "teacher.server in place of teacher.path: another device scores (docs/teachers/servers.md)",
        run._replace(scorers=[scorer for scorer in run.scorers if scorer not in own]),
    )


def _shards(run: Run, room: float) -> tuple[str, Run] | None:
    """FSDP 2: on the processes that are there, if each holds a whole student; then on more, by powers of two."""
    count = run.processes.count
    if count == 1 or run.processes.sharded:
        count *= 2
    while count <= min(MOST_PROCESSES, len(run.samples)):
        changed = run._replace(processes=dataclasses.replace(run.processes, count=count, sharded=True))
        if Memory(changed).peak <= room:
            return (
                f"FSDP 2 on {count} processes (--accelerate recipes/accelerate/fsdp2.yaml --processes {count})",
                changed,
            )
        count *= 2
    return None


def _with(run: Run, **settings: object) -> Run:
    return run._replace(config=dataclasses.replace(run.config, **settings))  # type: ignore[arg-type]
