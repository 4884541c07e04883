"""What one step takes, as a table: shapes, FLOPs, and the memory of a process (docs/understand/accounting.md)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from fastkl.trainer.commands import memory
from fastkl.trainer.commands.memory import Shape
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig, RunConfig
from fastkl.trainer.data.batching import Layout, batches
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.sizes.flops import cost_of, sampling_flops, scoring_flops, training_flops, without_adapter
from fastkl.trainer.objectives.registry import make_objective, teacher_passes
from fastkl.trainer.runs import processes

GIB = 2**30
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
REQUESTS = 64  # completions in progress at once, where `sampling.max_requests` is null
LOGITS = 4  # float32 copies of a place's logits while its token is drawn


class Plan(NamedTuple):
    """A run that has been checked, with outlines of its models and the samples of its first step."""

    config: RunConfig
    accelerator: Accelerator
    student: PreTrainedModel
    scorers: list[Scorer]  # those that no server holds
    prompts: list[EncodedPrompt]
    samples: list[Sample]  # a distillation's are of full length


class Scorer(NamedTuple):
    """A model that scores samples."""

    role: str  # teacher or reference
    config: TeacherConfig
    model: PreTrainedModel  # of one that is the student, the student's
    data_sets: frozenset[str]  # whose samples it scores

    @property
    def name(self) -> str:
        """How it is called in the table."""
        return f"{self.role} {self.config.path or self.config.self}"

    def read(self, samples: list[Sample]) -> list[Sample]:
        """Its part of a step's samples, as it reads them."""
        own = [sample for sample in samples if sample.dataset in self.data_sets]
        return [sample.for_teacher() for sample in own] if self.role == "teacher" else own


class Part(NamedTuple):
    """Some bytes of memory; None where they cannot be told."""

    name: str
    bytes: float | None


def lines(plan: Plan) -> Iterator[str]:
    """The table, line by line."""
    lengths = [len(prompt.ids) for prompt in plan.prompts]
    mean = sum(lengths) / len(lengths)
    yield f"{'data':12}{len(lengths):,} prompts of {min(lengths)} to {max(lengths)} tokens, {mean:.0f} on average"
    yield f"{'a step':12}{_step(plan)}"
    passes = Passes(plan, plan.samples)
    count, largest = len(passes.shapes), passes.largest
    yield (
        f"{'an update':12}{count} forward and backward passes a process, {passes.layout}; the largest has {largest.rows} × "
        f"{largest.width} tokens"
    )
    for name, flops in _flops(plan):
        yield f"{'FLOPs':12}{flops:8.2e}  {name}"
    yield from _memory(plan, passes)


class Passes:
    """The forward passes of samples, in the minibatches of an update, on the process with the longest of them."""

    def __init__(self, plan: Plan, samples: list[Sample]) -> None:
        self._plan, self._samples = plan, samples
        attention = str(plan.student.config._attn_implementation)
        chosen = plan.config.batch.layout
        self.layout: Layout = ("packed" if "flash" in attention else "padded") if chosen == "auto" else chosen

    @cached_property
    def shapes(self) -> list[Shape]:
        found = []
        for first in range(self._plan.config.optim.substeps):
            minibatch = sorted(self._samples[first :: self._plan.config.optim.substeps], key=lambda s: len(s.ids))
            own = minibatch[processes.count() - 1 :: processes.count()] or minibatch
            for batch in batches(own, self._plan.config.batch.max_tokens, self.layout, torch.device("cpu")):
                rows, width = batch.inputs["input_ids"].shape
                found.append(Shape(rows, width, len(batch.tokens)))
        return found

    @property
    def largest(self) -> Shape:
        return max(self.shapes, key=lambda shape: (shape.rows * shape.width, shape.width))


def _step(plan: Plan) -> str:
    tokens = sum(len(sample.ids) for sample in plan.samples)
    if isinstance(plan.config, DistillConfig):
        sampling = plan.config.sampling
        ahead = f", by weights so many steps old: {sampling.steps_ahead}" if sampling.steps_ahead else ""
        return (
            f"{sampling.prompts_per_step} prompts × {sampling.samples_per_prompt} completions of at most "
            f"{sampling.max_new_tokens} tokens: at most {tokens:,} tokens{ahead}"
        )
    return (
        f"{len(plan.samples)} examples: {tokens:,} tokens, of which {sum(s.loss_tokens for s in plan.samples):,} count"
    )


def _flops(plan: Plan) -> Iterator[tuple[str, float]]:
    cost = cost_of(plan.student)
    if isinstance(plan.config, DistillConfig):
        yield "sampling", sampling_flops(cost, plan.samples)
        passes = teacher_passes(plan.config.loss)
        for scorer in plan.scorers:
            theirs = cost_of(scorer.model)
            theirs = without_adapter(theirs) if scorer.config.self == "base" else theirs
            yield scorer.name, passes * scoring_flops(theirs, scorer.read(plan.samples))
        preparing = make_objective(plan.config.loss, plan.config.sampling, None).preparing_flops(cost, plan.samples)
        if preparing:
            yield "the student's pass before the update", preparing
    yield "the student's update", training_flops(cost, plan.samples)


def _memory(plan: Plan, passes: Passes) -> Iterator[str]:
    accelerator = plan.accelerator
    shard = processes.count() if accelerator.is_fsdp2 else 1
    several = "" if processes.count() == 1 else f" of {processes.count()}, {'FSDP 2' if shard > 1 else 'DDP'}"
    yield f"{'memory':12}of a process{several}, on {accelerator.device}, GiB:"
    always, apart = list(_always(plan, shard)), list(_elsewhere(plan))
    yield from map(_row, always)
    held = sum(part.bytes or 0 for part in always)
    peaks = []
    for phase, parts in _phases(plan, passes, shard):
        yield from (_row(part._replace(name=f"{phase}: {part.name}")) for part in parts)
        peaks.append(held + sum(part.bytes or 0 for part in parts))
    unknown = any(part.bytes is None for _, parts in _phases(plan, passes, shard) for part in parts)
    yield f"{'':12}{max(peaks) / GIB:8.3f}  at the peak{', at least' if unknown else ''}"
    yield from map(_row, apart)


def _row(part: Part) -> str:
    return f"{'':12}{'unknown' if part.bytes is None else f'{part.bytes / GIB:.3f}':>8}  {part.name}"


def _always(plan: Plan, shard: int) -> Iterator[Part]:
    """What is there in every phase, once the first update is done."""
    if plan.accelerator.device.type == "cpu":
        scale = 1 if sys.platform == "darwin" else 1024
        yield Part("Python and libraries, as now", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
    weights, trained = memory.weights(plan.student), memory.gradients(plan.student)
    yield Part(f"the student's weights, {_parameters(plan.student)}", weights / shard)
    yield Part("Adam's two moments", 2 * trained / shard)
    if processes.count() > 1 and shard == 1:
        yield Part("DDP's buckets", trained)
    for scorer in plan.scorers:
        if scorer.config.device is None and (scorer.config.self is None or scorer.config.follows_student):
            yield _weights(scorer, shard)
    dtype = plan.config.sampling.dtype if isinstance(plan.config, DistillConfig) else None
    if dtype is not None:
        yield Part(f"the copy in {dtype} that samples", sum(p.numel() for p in plan.student.parameters()) * 2.0)


def _elsewhere(plan: Plan) -> Iterator[Part]:
    for scorer in plan.scorers:
        if scorer.config.device is not None:
            yield _weights(scorer, 1)


def _weights(scorer: Scorer, shard: int) -> Part:
    config, model = scorer.config, scorer.model
    where = "" if config.device is None else f" on {config.device}"
    if config.self is not None:
        kept = memory.second_weights(model, averaged=config.self == "ema", sharded=shard > 1) / shard
        return Part(f"the weights of {scorer.name}{where}, beside the student's", kept)
    size = memory.weights(model, config.quantization)
    return Part(f"the weights of {scorer.name}{where}, {_parameters(model)}", size)


def _phases(plan: Plan, passes: Passes, shard: int) -> Iterator[tuple[str, list[Part]]]:
    """What each phase of a step needs in addition."""
    student, config, largest = plan.student, plan.config, passes.largest
    device, autocast = plan.accelerator.device, AUTOCAST[config.mixed_precision]
    if isinstance(config, DistillConfig) and not config.sampling.server.url:
        sequences = min(config.sampling.max_requests or REQUESTS, -(-len(plan.samples) // processes.count()))
        width = max(len(sample.ids) for sample in plan.samples)
        itemsize = 2 if config.sampling.dtype else next(student.parameters()).element_size()
        parts = [
            Part(f"keys and values of {sequences} × {width} tokens", memory.cache(student, sequences, width, itemsize)),
            Part("logits", sequences * _vocabulary(student) * 4.0 * LOGITS),
        ]
        if shard > 1:
            parts.append(Part("the gathered student", memory.weights(student)))
        yield "sampling", parts
    compared = 2 if isinstance(config, DistillConfig) and config.loss.baseline == "kl" else 1
    for scorer in plan.scorers:
        read = Passes(plan, scorer.read(plan.samples) or plan.samples).largest
        kept = memory.activations(scorer.model, read, passes.layout, None, "off")
        layers = scorer.model.config.get_text_config().num_hidden_layers
        parts = [
            Part("a layer", None if kept is None else kept / layers),
            Part("a chunk of logits", memory.head_workspace(scorer.model, read.counted, device, compared)),
            *_gathered(scorer, shard),
        ]
        if scorer.config.device is None:
            yield scorer.role, parts
    yield "saving", [Part("the student's tensors as bytes", memory.weights(student))]
    sampled = _sampled_objective(config)
    heads, products = 1 if sampled else 2, autocast or student.dtype
    gathered = [part for scorer in plan.scorers for part in _gathered(scorer, shard)]
    yield (
        "update",
        [
            *([] if sampled else gathered),
            Part("gradients", memory.gradients(student) / shard),
            Part("activations", memory.activations(student, largest, passes.layout, autocast, config.student.dropout)),
            Part("chunks of logits", memory.head_workspace(student, largest.counted, device, heads, products)),
        ],
    )


def _gathered(scorer: Scorer, shard: int) -> Iterator[Part]:
    """What one that is a sharded student needs while it scores."""
    config, student = scorer.config, scorer.model
    if shard == 1 or config.self is None or config.device is not None:
        return
    if not (config.follows_student and all(parameter.requires_grad for parameter in student.parameters())):
        yield Part("the gathered student", memory.weights(student))
    if config.follows_student:
        yield Part(f"the gathered weights of {scorer.name}", memory.gradients(student))


def _sampled_objective(config: Any) -> bool:
    return not isinstance(config, DistillConfig) or config.loss.objective in ("policy_gradient", "top_k")


def _parameters(model: PreTrainedModel) -> str:
    count, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    some = "" if trained in (0, count) else f", {trained / 1e6:,.1f} M of them trained"
    return f"{count / 1e6:,.1f} M parameters{some}, {str(model.dtype).removeprefix('torch.')}"


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.get_output_embeddings().weight.shape[0]
    return size
