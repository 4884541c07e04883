"""What one step takes, as a table: shapes, FLOPs, and the memory of a process (docs/speed/accounting.md)."""

from __future__ import annotations

from collections.abc import Iterator

from fastkl.trainer.commands.plan.parts import Memory, Part
from fastkl.trainer.commands.plan.passes import Passes
from fastkl.trainer.commands.plan.run import Run
from fastkl.trainer.commands.plan.work import work
from fastkl.trainer.config.training import DistillConfig

GIB = 2**30


def lines(run: Run) -> Iterator[str]:
    """The table, line by line."""
    mean = sum(run.lengths) / len(run.lengths)
    yield (
        f"{'data':12}{len(run.lengths):,} prompts of {min(run.lengths)} to {max(run.lengths)} tokens, {mean:.0f} on average"
    )
    yield from step(run)
    yield from memory(run, Memory(run))


def step(run: Run) -> Iterator[str]:
    """Its samples, its passes, its FLOPs."""
    yield f"{'a step':12}{_samples(run)}"
    passes = Passes(run, run.samples)
    yield (
        f"{'an update':12}{len(passes.shapes)} forward and backward passes a process, {passes.layout}; the largest has "
        f"{passes.largest.rows} × {passes.largest.width} tokens"
    )
    for name, flops in work(run):
        yield f"{'FLOPs':12}{flops:8.2e}  {name}"


def memory(run: Run, found: Memory) -> Iterator[str]:
    """Each part, and the peak."""
    yield f"{'memory':12}of {run.processes}, on {run.processes.device}, GiB:"
    yield from map(_row, found.always)
    for phase in found.phases:
        yield from (_row(part._replace(name=f"{phase.name}: {part.name}")) for part in phase.parts)
    yield f"{'':12}{found.peak / GIB:8.3f}  at the peak{'' if found.is_whole else ', at least'}"
    yield from map(_row, found.elsewhere)


def _samples(run: Run) -> str:
    tokens = sum(len(sample.ids) for sample in run.samples)
    if isinstance(run.config, DistillConfig):
        sampling = run.config.sampling
        ahead = f", by weights so many steps old: {sampling.steps_ahead}" if sampling.steps_ahead else ""
        return (
            f"{sampling.prompts_per_step} prompts × {sampling.samples_per_prompt} completions of at most "
            f"{sampling.max_new_tokens} tokens: at most {tokens:,} tokens{ahead}"
        )
    return f"{len(run.samples)} examples: {tokens:,} tokens, of which {sum(s.loss_tokens for s in run.samples):,} count"


def _row(part: Part) -> str:
    return f"{'':12}{'unknown' if part.bytes is None else f'{part.bytes / GIB:.3f}':>8}  {part.name}"
