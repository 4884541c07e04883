"""`fastkl plan`: what a run takes on devices that need not be here."""

from __future__ import annotations

from collections.abc import Iterator

from fastkl.trainer.commands.plan.advice import advice
from fastkl.trainer.commands.plan.assumed import Planned, planned
from fastkl.trainer.commands.plan.devices import DEVICES, KEPT, room
from fastkl.trainer.commands.plan.hours import SERVED, Duration, durations
from fastkl.trainer.commands.plan.parts import Memory
from fastkl.trainer.commands.plan.table import GIB, lines
from fastkl.trainer.commands.plan.work import SAMPLING
from fastkl.trainer.config.offline import DistillPlan, SftPlan
from fastkl.trainer.config.training import DistillConfig

HEAD = " " * 12


def print_plan(config: DistillPlan | SftPlan) -> None:
    """Prints the plan of a config.

    Raises:
        ConfigError: Where a model's config.json is missing.
    """
    print("\n".join(plan_lines(config)), flush=True)


def plan_lines(config: DistillPlan | SftPlan) -> Iterator[str]:
    """Memory, FLOPs, hours, and what to change where it does not fit."""
    found = planned(config)
    yield from (f"{'assumed':12}{line}" for line in [*found.assumed, *_of_devices(config)])
    yield from lines(found.run)
    yield from _fit(found, config)
    yield from _hours(found, config)
    yield from _servers(found)


def _of_devices(config: DistillPlan | SftPlan) -> Iterator[str]:
    if config.device == "cpu":
        yield "a cpu of this machine's memory; of its rates nothing is known, so no hours"
        return
    device = DEVICES[config.device]
    yield (
        f"{device.title} by its datasheet: {device.gigabytes:g} GB, of which {KEPT:.0%} are planned with; {device.half:g} "
        f"TFLOP/s in bf16, {device.single:g} in float32; {device.bandwidth:g} TB/s"
    )
    yield (
        f"{config.flops_share:.0%} of these FLOP/s and {config.bandwidth_share:.0%} of the bandwidth are reached; "
        f"none of this was measured"
    )


def _fit(found: Planned, config: DistillPlan | SftPlan) -> Iterator[str]:
    space, peak = room(config.device, config.memory), Memory(found.run).peak
    if space is None:
        return
    if peak <= space:
        yield f"{'it fits':12}{peak / GIB:.1f} of {space / GIB:.1f} GiB, {found.run.processes}"
        return
    yield f"{'too large':12}{peak / GIB:.1f} GiB, and there are {space / GIB:.1f}. In this order, with those before:"
    for change in advice(found.run, space):
        peak = change.peak
        yield f"{HEAD}{change.peak / GIB:8.1f}  {change.words}"
    if peak > space:
        yield f"{HEAD}still too large: a LoRA adapter (student.lora.rank), a smaller model or a larger device"


def _hours(found: Planned, config: DistillPlan | SftPlan) -> Iterator[str]:
    phases = list(durations(found.run, config))
    if not phases:
        return
    yield f"{'hours':12}of a step, at the least:"
    for phase in phases:
        yield f"{HEAD}{phase.hours:8.3f}  {phase.name}: {phase.why}"
    step, how = hours_of_step(config, phases)
    yield f"{HEAD}{step:8.3f}  {how}; {step * config.optim.steps:,.1f} for {config.optim.steps} steps"


def hours_of_step(config: DistillPlan | SftPlan, phases: list[Duration]) -> tuple[float, str]:
    """One after the other; but a server that works ahead samples while the rest is done."""
    sampling = sum(phase.hours for phase in phases if phase.name == SAMPLING)
    others = sum(phase.hours for phase in phases) - sampling
    if isinstance(config, DistillPlan) and config.sampling.steps_ahead:
        return max(sampling, others), "the longer of sampling and the rest, which go on together"
    return sampling + others, "in all"


def _servers(found: Planned) -> Iterator[str]:
    config = found.run.config
    if not isinstance(config, DistillConfig):
        return
    if config.sampling.server.url:
        yield (
            f"{'servers':12}sampling is counted as if a server had a device for each process, {SERVED} completions at once "
            f"on each; the trainer {'learns from earlier samples' if config.sampling.steps_ahead else 'waits'} meanwhile"
        )
    served = sorted(name for name, teacher in config.teachers().items() if config.has_teacher and teacher.server.url)
    if served:
        yield f"{'servers':12}{', '.join(served)}: behind a server, not counted; give its path in place of it to count it"
