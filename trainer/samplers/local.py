"""The sampler of a model in this process: by which of Transformers' two ways."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler, obstacle_to_continuous_batching
from fastkl.trainer.samplers.generate import GenerateSampler
from fastkl.trainer.samplers.sampler import Sampler

DEFAULT = SamplingConfig()


def local_sampler(
    model: PreTrainedModel, *, eos_token_ids: Iterable[int], settings: SamplingConfig = DEFAULT
) -> Sampler:
    """Continuous batching where the model allows it, `generate` elsewhere, or what `settings.engine` says.

    Raises:
        ConfigError: If the engine that is asked for cannot sample from the model.
    """
    engine = settings.engine
    if engine == "auto":
        engine = "continuous_batching" if obstacle_to_continuous_batching(model) is None else "generate"
    if engine == "generate":
        return GenerateSampler(model, eos_token_ids=eos_token_ids, max_requests=settings.max_requests)
    return ContinuousBatchingSampler(
        model,
        eos_token_ids=eos_token_ids,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
