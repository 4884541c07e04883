"""The sampler of a model in this process: by which of Transformers' two ways."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from fastkl.trainer.config.sampling import EngineConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.self_checks.probe import Probe
from fastkl.trainer.notes import note
from fastkl.trainer.rollouts.samplers.continuous_batching import (
    ContinuousBatchingSampler,
    obstacle_to_continuous_batching,
)
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.rollouts.samplers.in_progress import wants_pages
from fastkl.trainer.rollouts.samplers.sampler import Sampler
from fastkl.trainer.rollouts.samplers.self_check import fault

DEFAULT = EngineConfig()


def local_sampler(model: PreTrainedModel, *, eos_token_ids: Iterable[int], settings: EngineConfig = DEFAULT) -> Sampler:
    """What `settings.engine` says; `auto` is `generate` on a CPU, or where continuous batching is wrong for the model.

    It is continuous batching where `settings.max_batch_tokens` is set, which means nothing to the other. Whether a way is
    right is measured: the log-probs of a few tokens must be those of the model's own forward pass. All processes call
    this, with a model that has its weights.

    Raises:
        ConfigError: If the engine that is asked for, by its name or by that setting, cannot sample from the model.
    """
    ends, probe = list(eos_token_ids), Probe(model, "model")
    asked = wants_pages(settings)
    if asked or (settings.engine == "auto" and not generate_is_quicker(model)):
        sampler, obstacle = _continuous_batching(probe, ends, settings)
        if sampler is not None:
            return sampler
        if asked:
            raise ConfigError(
                f"no continuous batching: {obstacle}; set sampling.engine to generate and leave max_batch_tokens out"
            )
        note(f"sampling by generate, not by continuous batching: {obstacle}")
    return _generate(probe, ends, settings)


def generate_is_quicker(model: PreTrainedModel) -> bool:
    """On a CPU paged attention scores every query against the keys of all requests, and masks.

    `generate` was up to twice as fast there (docs/speed/speed.md).
    """
    return model.device.type == "cpu"


def _continuous_batching(
    probe: Probe, ends: list[int], settings: EngineConfig
) -> tuple[ContinuousBatchingSampler | None, str | None]:
    """The sampler, or why there is none."""
    obstacle = obstacle_to_continuous_batching(probe.model)
    if obstacle is not None:
        return None, obstacle
    sampler = ContinuousBatchingSampler(
        probe.model,
        eos_token_ids=ends,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
    wrong = fault(sampler, probe)
    return (sampler, None) if wrong is None else (None, wrong)


def _generate(probe: Probe, ends: list[int], settings: EngineConfig) -> GenerateSampler:
    """In whole batches, or in the largest that are right: some models read the padding before a shorter prompt."""
    most = settings.max_requests
    ways = [("batches of prompts of one length", most, True), ("batches of one prompt", 1, False)]
    sampler = GenerateSampler(probe.model, eos_token_ids=ends, max_requests=most)
    wrong = fault(sampler, probe)
    while wrong is not None and ways:
        way, requests, one_length = ways.pop(0)
        sampler = GenerateSampler(probe.model, eos_token_ids=ends, max_requests=requests, one_length=one_length)
        before, wrong = wrong, fault(sampler, probe)
        if wrong is None:
            note(f"sampling by generate in {way}: in others {before}")
    if wrong is not None:
        raise ConfigError(
            f"no sampling by Transformers' generate: {wrong}. Sample on a server (sampling.server), or use another model"
        )
    return sampler
