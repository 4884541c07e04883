"""The forward passes of a step: how many, and the largest of them."""

from __future__ import annotations

from functools import cached_property

from fastkl.trainer.commands.plan.run import Run
from fastkl.trainer.commands.plan.sizes import Shape
from fastkl.trainer.data.batching import Layout, grouped
from fastkl.trainer.data.samples import Sample


class Passes:
    """The forward passes of samples, in the minibatches of an update, on the process with the longest of them."""

    def __init__(self, run: Run, samples: list[Sample]) -> None:
        self._run, self._samples = run, samples
        attention = str(run.student.config._attn_implementation)
        chosen = run.config.batch.layout
        self.layout: Layout = ("packed" if "flash" in attention else "padded") if chosen == "auto" else chosen

    @cached_property
    def shapes(self) -> list[Shape]:
        count, substeps, found = self._run.processes.count, self._run.config.optim.substeps, []
        for first in range(substeps):
            minibatch = sorted(self._samples[first::substeps], key=lambda s: len(s.ids))
            own = minibatch[count - 1 :: count] or minibatch
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
