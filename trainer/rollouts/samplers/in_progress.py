"""How many completions are in progress at once, and for how many tokens there is room."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastkl.trainer.config.sampling import EngineConfig

USUAL = 64  # completions, where `sampling.max_requests` is null
KEYS_PER_STEP = 4096  # of continuous batching on a CPU
PAGE_SIZE = 32  # tokens of a page of its cache

_DEFAULT = EngineConfig()


class InProgress(NamedTuple):
    """The state of a sampler that is busy."""

    completions: int
    tokens: int  # whose keys and values have room; of a paged cache, all of it from the start
    paged: bool  # by continuous batching, else by `generate`
    batch_tokens: int  # the most in a forward pass of continuous batching


def in_progress(settings: EngineConfig, prompts: int, longest: int, on_cpu: bool) -> InProgress:
    """For so many prompts, the longest with its completion of so many tokens, where both ways work."""
    if not wants_pages(settings) and (settings.engine == "generate" or on_cpu):
        completions = evened(prompts, settings.max_requests or USUAL)
        return InProgress(completions, completions * longest, paged=False, batch_tokens=completions * longest)
    completions = evened(prompts, settings.max_requests or usual_requests(longest, on_cpu))
    room = pages(completions, longest) * PAGE_SIZE
    return InProgress(completions, room, paged=True, batch_tokens=max(completions, settings.max_batch_tokens))


def wants_pages(settings: EngineConfig) -> bool:
    """Whether continuous batching is asked for, by its name or by a setting that is its own."""
    return settings.engine == "continuous_batching" or settings.max_batch_tokens != _DEFAULT.max_batch_tokens


def usual_requests(longest: int, on_cpu: bool) -> int:
    """On a CPU every token of a step scores the keys of all requests in it: few at a time, where they are long."""
    return min(USUAL, max(8, KEYS_PER_STEP // longest)) if on_cpu else USUAL


def evened(prompts: int, requests: int) -> int:
    """No last round of a few: its steps take almost as long as full ones."""
    return math.ceil(prompts / math.ceil(prompts / requests)) if prompts else 0


def pages(completions: int, longest: int) -> int:
    """Of the cache of continuous batching: twice what they fill at most."""
    return 2 * completions * (math.ceil(longest / PAGE_SIZE) + 1)
