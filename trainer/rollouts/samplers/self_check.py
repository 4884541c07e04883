"""Whether a sampler's log-probs are those of the model's own forward pass."""

from __future__ import annotations

import torch

from fastkl.trainer.models.self_checks.probe import NEW, Probe, distance, failure
from fastkl.trainer.rollouts.samplers.common import unwrapped
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.runs import processes

Engine = ContinuousBatchingSampler | GenerateSampler


def fault(sampler: Engine, probe: Probe) -> str | None:
    """What is wrong with completions of prompts of different lengths and of one length, in words; None: nothing.

    All processes call it, and come to the same.
    """
    return next(iter(processes.gather(_faults(sampler, probe))), None)


def _faults(sampler: Engine, probe: Probe) -> list[str]:
    kind = type(unwrapped(probe.model)).__name__
    try:
        completions = sampler.draw(probe.texts, max_new_tokens=NEW, temperature=1.0, seed=0)
    except Exception as error:
        return [f"it fails on {kind} ({failure(error)})"]
    worst = 0.0
    for prompt, done in zip(probe.texts, completions, strict=True):
        logits = probe.plain_logits(prompt + done.token_ids)[len(prompt) - 1 : -1]
        worst = max(worst, distance(torch.tensor(done.logprobs), logits, done.token_ids))
    if worst <= probe.limit:
        return []
    return [f"its log-probs are {worst:.2g} of their spread away from those of {kind} itself"]
