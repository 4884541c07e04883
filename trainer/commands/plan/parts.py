"""The memory of a process by phase (docs/speed/accounting.md). A GPU's is the device's, a CPU's the process's own."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from fastkl.trainer.commands.plan import sizes
from fastkl.trainer.commands.plan.passes import Passes
from fastkl.trainer.commands.plan.run import Run, Scorer
from fastkl.trainer.commands.plan.sizes import Shape
from fastkl.trainer.config.training import DistillConfig, RunConfig
from fastkl.trainer.data.batching import Layout
from fastkl.trainer.rollouts.samplers.in_progress import in_progress

AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_SHARE = 0.6  # of an earlier pass's activations, by the C library on a CPU
LOGITS = 4  # float32 copies of a place's logits while its token is drawn


class Part(NamedTuple):
    """Some bytes of memory; None where they cannot be told."""

    name: str
    bytes: float | None


class Phase(NamedTuple):
    """What a phase of a step needs beside what is always there."""

    name: str
    parts: list[Part]

    @property
    def bytes(self) -> float:
        return sum(part.bytes or 0 for part in self.parts)


class Memory:
    """What a process of a run holds."""

    def __init__(self, run: Run) -> None:
        self._run, self._shards = run, run.processes.shards

    @cached_property
    def always(self) -> list[Part]:
        """What is there in every phase, once the first update is done."""
        return list(self._always())

    @cached_property
    def elsewhere(self) -> list[Part]:
        """What lies on devices of their own."""
        return [_weights(scorer, 1) for scorer in self._run.scorers if scorer.config.device is not None]

    @cached_property
    def phases(self) -> list[Phase]:
        return [*self._sampling(), *self._scoring(), *self._saving(), self._update()]

    @property
    def held(self) -> float:
        return sum(part.bytes or 0 for part in self.always)

    @property
    def largest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> float:
        return self.held + self.largest.bytes

    @property
    def is_whole(self) -> bool:
        """Whether all parts are known."""
        return all(part.bytes is not None for phase in self.phases for part in phase.parts)

    def _always(self) -> Iterator[Part]:
        run, shards = self._run, self._shards
        if run.processes.on_cpu:
            scale = 1 if sys.platform == "darwin" else 1024
            yield Part("Python and libraries, as now", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
        weights, trained = sizes.weights(run.student), sizes.gradients(run.student)
        yield Part(f"the student's weights, {parameters(run.student)}", weights / shards)
        yield Part("Adam's two moments", 2 * trained / shards)
        if run.processes.count > 1 and not run.processes.sharded:
            yield Part("DDP's buckets", trained)
        for scorer in run.scorers:
            if scorer.config.device is None and (scorer.config.self is None or scorer.config.follows_student):
                yield _weights(scorer, shards)
        dtype = run.config.sampling.dtype if isinstance(run.config, DistillConfig) else None
        if dtype is not None:
            yield Part(f"the copy in {dtype} that samples", sum(p.numel() for p in run.student.parameters()) * 2.0)

    def _sampling(self) -> Iterator[Phase]:
        run, config = self._run, self._run.config
        if not isinstance(config, DistillConfig) or config.sampling.server.url:
            return
        own, width = -(-len(run.samples) // run.processes.count), max(len(sample.ids) for sample in run.samples)
        busy = in_progress(config.sampling, own, width, run.processes.on_cpu)
        itemsize = 2 if config.sampling.dtype else next(run.student.parameters()).element_size()
        keys = f"keys and values of {busy.completions} × {width:,} tokens{', twice: pages' if busy.paged else ''}"
        yield Phase(
            "sampling",
            [
                Part(keys, sizes.cache(run.student, busy, width, itemsize)),
                *(Part(name, size) for name, size in sizes.paged_attention(run.student, busy, width, itemsize)),
                Part("logits", busy.completions * vocabulary(run.student) * 4.0 * LOGITS),
                *self._gathered_student(),
            ],
        )

    def _scoring(self) -> Iterator[Phase]:
        run, config = self._run, self._run.config
        compared = 2 if isinstance(config, DistillConfig) and config.loss.baseline == "kl" else 1
        for scorer in run.scorers:
            passes = Passes(run, scorer.read(run.samples) or run.samples)
            read = passes.largest
            kept = sizes.activations(scorer.model, read, passes.layout, None, "off")
            layers = scorer.model.config.get_text_config().num_hidden_layers
            chunk = sizes.head_workspace(scorer.model, read.counted, run.processes.on_cpu, compared)
            parts = [
                Part("a layer", None if kept is None else kept / layers),
                Part("a chunk of logits", chunk),
                *self._gathered(scorer),
            ]
            if scorer.config.device is None:
                yield Phase(scorer.role, parts)

    def _saving(self) -> Iterator[Phase]:
        """A GPU's copies are made in the host's memory."""
        run = self._run
        if run.processes.on_cpu:
            yield Phase("a checkpoint", [Part("copies of weights and moments", 3 * sizes.gradients(run.student))])
        if run.processes.sharded:
            yield Phase("handing over weights, and saving", list(self._gathered_student()))

    def _update(self) -> Phase:
        run, config = self._run, self._run.config
        passes, sampled = Passes(run, run.samples), is_sampled(config)
        largest, autocast = passes.largest, AUTOCAST[config.mixed_precision]
        heads, products = 1 if sampled else 2, autocast or run.student.dtype
        gathered = [part for scorer in run.scorers for part in self._gathered(scorer)]
        activations = sizes.activations(run.student, largest, passes.layout, autocast, config.student.dropout)
        chunks = sizes.head_workspace(run.student, largest.counted, run.processes.on_cpu, heads, products)
        return Phase(
            "update",
            [
                *([] if sampled else gathered),
                Part("gradients", sizes.gradients(run.student) / self._shards),
                *self._unsharded(autocast),
                Part("activations", activations),
                *self._recomputed(largest, passes.layout, autocast),
                Part("chunks of logits", chunks),
                Part("the head's gradient, and its rounded weights", sizes.head_products(run.student, autocast)),
                *self._kept_by_the_library(activations or 0.0),
            ],
        )

    def _recomputed(self, shape: Shape, layout: Layout, autocast: torch.dtype | None) -> Iterator[Part]:
        """Under gradient checkpointing: one layer's activations at a time."""
        run = self._run
        if not run.config.student.gradient_checkpointing:
            return
        whole = sizes.activations_of_layer(run.student, shape, layout, autocast, run.config.student.dropout)
        yield Part("a layer that is computed again", whole)

    def _kept_by_the_library(self, activations: float) -> Iterator[Part]:
        """On a CPU: what the C library keeps of an earlier pass, where nothing that lasts has taken its place since.

        A share that was measured, of passes of different widths: docs/speed/accounting.md.
        """
        kept = KEPT_SHARE * activations - 3 * sizes.gradients(self._run.student) / self._shards
        if self._run.processes.on_cpu and kept > 0:
            yield Part("freed blocks of an earlier pass", kept)

    def _unsharded(self, autocast: torch.dtype | None) -> Iterator[Part]:
        """What FSDP 2 gathers while a layer is computed: the embeddings and the head, that layer and the next one."""
        if not self._run.processes.sharded:
            return
        layer, root = sizes.units(self._run.student)
        share = 1.0 if autocast is None else autocast.itemsize / self._run.student.dtype.itemsize
        yield Part("gathered weights", share * (root.weights + 2 * layer.weights))
        yield Part("their gradients before they are shared out", share * (root.trained + 2 * layer.trained))

    def _gathered_student(self) -> Iterator[Part]:
        if self._run.processes.sharded:
            yield Part("the gathered student", sizes.weights(self._run.student))

    def _gathered(self, scorer: Scorer) -> Iterator[Part]:
        """What one that is a sharded student needs while it scores."""
        config, student = scorer.config, scorer.model
        if self._shards == 1 or config.self is None or config.device is not None:
            return
        if not (config.follows_student and all(parameter.requires_grad for parameter in student.parameters())):
            yield from self._gathered_student()
        if config.follows_student:
            yield Part(f"the gathered weights of {scorer.name}", sizes.gradients(student))


def is_sampled(config: RunConfig) -> bool:
    """Whether the update needs one head: not the teacher's beside the student's."""
    return not isinstance(config, DistillConfig) or config.loss.objective in ("policy_gradient", "top_k")


def parameters(model: PreTrainedModel) -> str:
    """How many there are, and in which dtype."""
    count, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    some = "" if trained in (0, count) else f", {trained / 1e6:,.1f} M of them trained"
    return f"{count / 1e6:,.1f} M parameters{some}, {str(model.dtype).removeprefix('torch.')}"


def vocabulary(model: PreTrainedModel) -> int:
    """The rows of its head."""
    size: int = model.get_output_embeddings().weight.shape[0]
    return size


def _weights(scorer: Scorer, shards: int) -> Part:
    config, model = scorer.config, scorer.model
    where = "" if config.device is None else f" on {config.device}"
    if config.self is not None:
        kept = sizes.second_weights(model, averaged=config.self == "ema", sharded=shards > 1) / shards
        return Part(f"the weights of {scorer.name}{where}, beside the student's", kept)
    size = sizes.weights(model, config.quantization)
    return Part(f"the weights of {scorer.name}{where}, {parameters(model)}", size)
