"""The sampler of a model in this process: by which of Transformers' two ways."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.rollouts.samplers.continuous_batching import (
    ContinuousBatchingSampler,
    obstacle_to_continuous_batching,
)
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.rollouts.samplers.sampler import Sampler

DEFAULT = SamplingConfig()


def local_sampler(
    model: PreTrainedModel, *, eos_token_ids: Iterable[int], settings: SamplingConfig = DEFAULT
) -> Sampler:
    """What `settings.engine` says; `auto` is `generate` on a CPU, or where the model rules out continuous batching.

    It is continuous batching where `settings.max_batch_tokens` is set, which means nothing to the other. On a CPU paged
    attention scores every query against the keys of all requests, and masks; `generate` was up to twice as fast there
    (docs/speed.md).

    Raises:
        ConfigError: If the engine that is asked for, by its name or by that setting, cannot sample from the model.
    """
    engine = settings.engine
    if engine == "auto":
        asked = settings.max_batch_tokens != DEFAULT.max_batch_tokens
        better = model.device.type == "cpu" or obstacle_to_continuous_batching(model) is not None
        engine = "generate" if better and not asked else "continuous_batching"
    if engine == "generate":
        return GenerateSampler(model, eos_token_ids=eos_token_ids, max_requests=settings.max_requests)
    return ContinuousBatchingSampler(
        model,
        eos_token_ids=eos_token_ids,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
