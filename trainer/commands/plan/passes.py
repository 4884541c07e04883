"""The forward passes of a step: how many, and the largest of them."""

from __future__ import annotations

from functools import cached_property

from fastkl.trainer.commands.plan.run import Run
from fastkl.trainer.commands.plan.sizes import Shape
from fastkl.trainer.data.batching import Layout, grouped
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.flops import cost_of, work
from fastkl.trainer.runs.sharing.shares import balanced


class Passes:
    """The forward passes of samples, in the minibatches of an update, on the process with the longest of them."""

    def __init__(self, run: Run, samples: list[Sample]) -> None:
        self._run, self._samples = run, samples
        attention = str(run.student.config._attn_implementation)
        chosen = run.config.batch.layout
        self.layout: Layout = ("packed" if "flash" in attention else "padded") if chosen == "auto" else chosen

    @cached_property
    def shapes(self) -> list[Shape]:
        substeps, found, cost = self._run.config.optim.substeps, [], cost_of(self._run.student)
        for first in range(substeps):
            minibatch = self._samples[first::substeps]
            owners = balanced(work(cost, minibatch), [0] * len(minibatch), self._run.processes.count)
            longest = owners[max(range(len(minibatch)), key=lambda place: len(minibatch[place].ids))]
            own = [sample for sample, owner in zip(minibatch, owners, strict=True) if owner == longest]
            found += [self._shape(group) for group in grouped(own, self._run.config.batch.max_tokens, self.layout)]
        return found

    def _shape(self, samples: list[Sample]) -> Shape:
        lengths, counted = [len(sample.ids) for sample in samples], sum(sample.loss_tokens for sample in samples)
        if self.layout == "packed":
            return Shape(1, sum(lengths), counted)
        return Shape(len(lengths), max(lengths), counted)

    @property
    def largest(self) -> Shape:
        return max(self.shapes, key=lambda shape: (shape.rows * shape.width, shape.width))
