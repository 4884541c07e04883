"""The samples of a step: what the student writes, what it goes on with, and what the data give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.rollouts.lengths import length_limit
from fastkl.trainer.rollouts.single_turn import Responder, Trajectory
from fastkl.trainer.runs import processes

ROUNDING = 1e-9  # of a product that should be whole

Judge = Callable[[Trajectory, EncodedPrompt], float]


class Rollouts:
    """Samples of a step. What it goes on with from step to step is its state, which a checkpoint holds.

    Args:
        responder: Answers prompts.
        prompts: All prompts of the run, by their `index`.
        given: A sample of each prompt's given completion; empty where the student writes all.
        judge: The reward of a finished trajectory; None for no reward.
    """

    def __init__(
        self,
        config: SamplingConfig,
        responder: Responder,
        prompts: Sequence[EncodedPrompt],
        given: Sequence[Sample],
        judge: Judge | None,
    ) -> None:
        self._config, self._responder, self._prompts = config, responder, prompts
        self._given, self._judge = given, judge
        self._unfinished: list[dict[str, Any]] = []

    def samples(self, prompts: Sequence[EncodedPrompt], step: int, seed: int) -> list[Sample]:
        """Of these prompts; the first of them are the student's, the rest given.

        Several processes share the writing, and all have all samples.
        """
        own = on_policy_count(len(prompts), self._config.on_policy_fraction, step)
        starts = [(prompt, list[int]()) for prompt in prompts[:own] for _ in range(self._config.samples_per_prompt)]
        starts += [(self._prompts[start["prompt_index"]], start["completion"]) for start in self._unfinished]
        given = [dataclasses.replace(self._given[prompt.index], given=True) for prompt in prompts[own:]]
        mine = self._responder.my_share(starts)
        written = processes.raise_together(lambda: self._write(mine, step, processes.seed(seed)))
        return processes.gather(written) + given

    def carry_over(self, samples: Sequence[Sample]) -> None:
        """Ends a step: its unfinished samples go on in the next one."""
        self._unfinished = [
            {"prompt_index": sample.prompt_index, "completion": sample.ids[-sample.completion_length :]}
            for sample in samples
            if sample.unfinished
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"unfinished": self._unfinished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unfinished = state["unfinished"]

    def _write(self, starts: list[tuple[EncodedPrompt, list[int]]], step: int, seed: int) -> list[Sample]:
        limit = length_limit(self._config, step)
        portion = self._config.tokens_per_step or limit
        trajectories = self._responder.respond(
            [dataclasses.replace(prompt, tokens=prompt.ids + before) for prompt, before in starts],
            max_new_tokens=[min(portion, limit - len(before)) for _, before in starts],
            temperature=self._config.temperature,
            seed=seed,
        )
        return [self._sample(*start, t, limit) for start, t in zip(starts, trajectories, strict=True)]

    def _sample(self, prompt: EncodedPrompt, before: list[int], trajectory: Trajectory, limit: int) -> Sample:
        """`before` was sampled by older weights: it is context, like the prompt."""
        length, context = len(before) + len(trajectory.token_ids), prompt.ids + before
        sample = Sample(
            ids=context + trajectory.token_ids,
            loss_mask=[False] * len(context) + trajectory.counted,
            prompt_index=prompt.index,
            dataset=prompt.dataset,
            sampler_logprobs=[0.0] * len(context) + trajectory.logprobs,
            completion_length=length,
            feedback=trajectory.feedback,
        )
        sample.unfinished = trajectory.truncated and self._config.tokens_per_step is not None and length < limit
        sample.truncated = trajectory.truncated and not sample.unfinished
        if self._judge is not None and not sample.unfinished:
            whole = trajectory._replace(answer_ids=before + trajectory.answer_ids)
            sample.reward = self._judge(whole, prompt)
        return sample


def on_policy_count(prompts: int, fraction: float, step: int) -> int:
    """How many of a step's prompts the student completes: whole numbers that add up to the fraction over the steps."""
    return math.floor((step + 1) * prompts * fraction + ROUNDING) - math.floor(step * prompts * fraction + ROUNDING)
