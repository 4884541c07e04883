"""How long completions may get, and which of them the loss sees."""

from __future__ import annotations

from collections.abc import Sequence

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.samples import Sample


def length_limit(config: SamplingConfig, step: int) -> int:
    """Of a whole completion in a step (from 0): it grows by equal amounts and is whole from step `growth_steps` on."""
    if config.initial_new_tokens is None or step >= config.growth_steps:
        return config.max_new_tokens
    grown = (config.max_new_tokens - config.initial_new_tokens) * step // config.growth_steps
    return config.initial_new_tokens + grown


def filter_by_length(samples: Sequence[Sample], config: SamplingConfig) -> list[Sample]:
    """The samples that the loss sees: all but those that the length filters drop. Given completions pass."""
    return [sample for sample in samples if sample.given or sample.unfinished or _passes(sample, config)]


def _passes(sample: Sample, config: SamplingConfig) -> bool:
    if sample.truncated and config.drop_truncated:
        return False
    most = config.max_new_tokens if config.max_completion_tokens is None else config.max_completion_tokens
    return config.min_completion_tokens <= sample.completion_length <= most
