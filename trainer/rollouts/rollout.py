"""Rollouts: what the student itself writes in a step."""

from __future__ import annotations

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample, make_sample
from fastkl.trainer.samplers.sampler import Sampler


class Rollouts:
    """Samples of the student's own, one completion each."""

    def __init__(self, config: SamplingConfig, sampler: Sampler, prompts: list[EncodedPrompt]) -> None:
        self._config, self._sampler, self._prompts = config, sampler, prompts

    def sample(self, chosen: list[int], seed: int) -> list[Sample]:
        """`samples_per_prompt` samples of each of the prompts with these indices, in their order."""
        chosen = [index for index in chosen for _ in range(self._config.samples_per_prompt)]
        completions = self._sampler.sample(
            [self._prompts[index].ids for index in chosen],
            max_new_tokens=self._config.max_new_tokens,
            temperature=self._config.temperature,
            seed=seed,
        )
        return [
            make_sample(self._prompts[index].ids, c.token_ids, index, c.logprobs, truncated=c.truncated)
            for index, c in zip(chosen, completions, strict=True)
        ]
