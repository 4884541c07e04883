"""What the run of a config takes, as `fastkl plan` counts it, with completions as long as those of the probe."""

from __future__ import annotations

from typing import Any

from fastkl.trainer.commands.plan.growth import Growth
from fastkl.trainer.commands.plan.parts import Memory
from fastkl.trainer.commands.plan.run import Processes, Run, scorers_of
from fastkl.trainer.commands.plan.work import work
from fastkl.trainer.commands.probe.opened import Opened
from fastkl.trainer.commands.probe.written import Written
from fastkl.trainer.config.offline import ProbeConfig
from fastkl.trainer.data.mixture import step_prompts
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.models.loading import outline_of_student


def cost_of_run(config: ProbeConfig, found: Opened, written: Written) -> dict[str, Any]:
    """The memory of a process and the FLOPs of all steps."""
    student, sets = outline_of_student(config.student), found.prepared.data_sets
    prompts = step_prompts(sets, config.sampling.prompts_per_step, 0, config.seed)
    mean = round(sum(sample.completion_length for sample in written.samples) / len(written.samples))
    full, typical = (_samples(config, prompts, new) for new in (config.sampling.max_new_tokens, mean))
    found.prepared.teacher_prompts.give_fixed([*full, *typical])
    for sample in [*full, *typical]:
        if sample.dataset in found.prepared.teacher_prompts.own:
            Growth(1.0, written.aligned.growth).write(sample)
    started = Processes(1, False, str(found.student.device))
    lengths = [len(prompt.tokens) for prompt in found.prompts]
    run = Run(config, started, student, list(scorers_of(config, student)), lengths, full, typical)
    memory, phases = Memory(run), list(work(run))
    step = sum(phase.flops for phase in phases)
    return {
        "steps": config.optim.steps,
        "memory_bytes": memory.peak,
        "memory_is_whole": memory.is_whole,
        "flops_of_a_step": {phase.name: phase.flops for phase in phases},
        "flops": step * config.optim.steps,
        "served_teachers": sum(bool(teacher.server.url) for teacher in config.teachers().values()),
    }


def _samples(config: ProbeConfig, prompts: list[EncodedPrompt], new: int) -> list[Sample]:
    return [
        make_sample(prompt.ids, [0] * max(1, new), prompt.index, dataset=prompt.dataset)
        for prompt in prompts
        for _ in range(config.sampling.samples_per_prompt)
    ]
