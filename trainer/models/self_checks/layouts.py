"""How the sequences of a batch are laid out, so that each gets the log-probs that it gets alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from fastkl.trainer.config.optim import BatchConfig
from fastkl.trainer.data.batching import Layout, batches
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.scoring import batch_logprobs, scatter_values
from fastkl.trainer.models.self_checks.probe import Probe, distance, failure
from fastkl.trainer.notes import note
from fastkl.trainer.runs import processes

WAYS: dict[Layout, str] = {"padded": "in padded rows", "single": "one at a time"}


def batch_layout(config: BatchConfig, model: PreTrainedModel, probe: Probe) -> Layout:
    """`batch.layout` for a model, as far as two sequences in one forward pass are what each is alone.

    `auto` is packed rows with flash attention, which computes them without waste. Where packed rows fail, it is padded
    rows; where those fail, one sequence in a forward pass. All processes come to the same.

    Raises:
        ConfigError: For packed rows that are asked for and fail, and for a model that fails on one sequence.
    """
    first: Layout = config.layout if config.layout != "auto" else _quickest(model)
    ways: list[Layout] = ["packed", "padded", "single"]
    for layout in ways[ways.index(first) :]:
        reason = next(iter(processes.gather(_faults(model, layout, probe))), None)
        if reason is None:
            return layout
        if layout == config.layout == "packed":
            raise ConfigError(
                f"batch.layout is packed, but {reason}: the sequences of a row run into one another. Set it to padded or "
                f"auto"
            )
        if layout != "single":
            note(f"the {probe.name} reads its sequences {WAYS[ways[ways.index(layout) + 1]]}, because {reason}")
    raise ConfigError(
        f"the {probe.name} cannot be read: {reason} in its own forward pass. Its head, or how it counts its positions, is "
        f"unlike other models'; use another model"
    )


def _quickest(model: PreTrainedModel) -> Layout:
    return "packed" if "flash" in str(model.config._attn_implementation) else "padded"


def _faults(model: PreTrainedModel, layout: Layout, probe: Probe) -> list[str]:
    """What is wrong with a layout, in words; nothing if it is right."""
    samples = [make_sample(ids[:1], ids[1:], index) for index, ids in enumerate(probe.texts)]
    kind, device = type(probe.model).__name__, probe.model.device
    try:
        found = batches(samples, sum(len(sample.ids) for sample in samples) * 2, layout, device)
        scatter_values(model, found, "teacher_logprobs", lambda batch: batch_logprobs(model, batch, 1.0))
    except Exception as error:
        return [f"{kind} fails on {layout} rows ({failure(error)})"]
    worst = max(
        distance(torch.tensor(sample.teacher_logprobs[1:]), logits[:-1], sample.ids[1:].tolist())
        for sample, logits in zip(samples, probe.logits, strict=True)
    )
    if worst <= probe.limit:
        return []
    return [f"log-probs of {kind} in {layout} rows are {worst:.2g} of their spread away from those of a sequence alone"]
