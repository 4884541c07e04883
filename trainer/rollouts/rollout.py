"""The samples of a step: what the student writes, what it goes on with, and what the data give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.data.arrays import after_zeros
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.rollouts.lengths import length_limit
from fastkl.trainer.rollouts.single_turn import Finished, Responder, Trajectory
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.records import Record, gather

ROUNDING = 1e-9  # of a product that should be whole

Judge = Callable[[Trajectory, EncodedPrompt], float]
Start = tuple[EncodedPrompt, list[int]]
"""A prompt, and what earlier steps have written after it."""


class Rollouts:
    """Samples of a step. What it goes on with from step to step is its state, which a checkpoint holds.

    Args:
        responder: Answers prompts.
        prompts_of: The prompts of a step: the first of them are the student's, the rest given.
        seed: That of the run.
        prompts: All prompts of the run, by their `index`.
        given: A sample of each prompt's given completion; empty where the student writes all.
        judge: The reward of a finished trajectory; None for no reward.
    """

    def __init__(
        self,
        config: SamplingConfig,
        responder: Responder,
        prompts_of: Callable[[int], Sequence[EncodedPrompt]],
        seed: int,
        prompts: Sequence[EncodedPrompt],
        given: Sequence[Sample],
        judge: Judge | None,
    ) -> None:
        self._config, self._responder, self._prompts = config, responder, prompts
        self._prompts_of, self._seed = prompts_of, seed
        self._given, self._judge = given, judge
        self._unfinished: list[dict[str, Any]] = []

    def samples(self, step: int) -> list[Sample]:
        """This process's samples of a step: what it had the student write, and its part of the given ones.

        Their places are those that all have together: first the student's, in the order of the prompts.
        """
        starts = self._starts(step, self._unfinished)
        places, mine = self._responder.my_share(range(len(starts))), self._responder.my_share(starts)
        written = processes.raise_together(lambda: self._samples(mine, self._write(mine, step), step))
        return numbered(written, places) + self._given_samples(step, len(starts))

    def carry_over(self, samples: Sequence[Sample]) -> None:
        """Ends a step: the unfinished ones of its samples, on all processes, go on in the next one."""
        self._unfinished = everyones_unfinished(samples)

    def settle(self, stopping: Callable[[], bool]) -> None:
        """Waits until nothing is underway, or until the run is stopping."""

    def close(self) -> None:
        """Ends what is underway: the run is over."""

    def state_dict(self) -> dict[str, Any]:
        return {"unfinished": self._unfinished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unfinished = state["unfinished"]

    def _on_policy(self, step: int) -> tuple[Sequence[EncodedPrompt], int]:
        """The prompts of a step, and how many of them the student completes."""
        prompts = self._prompts_of(step)
        return prompts, on_policy_count(len(prompts), self._config.on_policy_fraction, step)

    def _given_samples(self, step: int, first: int) -> list[Sample]:
        """This process's part of the given ones, whose places begin with `first`."""
        prompts, own = self._on_policy(step)
        mine = processes.my_share(list(enumerate(prompts[own:], first)))
        return [dataclasses.replace(self._given[prompt.index], given=True, place=place) for place, prompt in mine]

    def _starts(self, step: int, unfinished: Sequence[dict[str, Any]]) -> list[Start]:
        """What the student goes on with in a step: its prompts, and what is unfinished by then."""
        prompts, own = self._on_policy(step)
        starts = [(prompt, list[int]()) for prompt in prompts[:own] for _ in range(self._config.samples_per_prompt)]
        return starts + [(self._prompts[start["prompt_index"]], start["completion"]) for start in unfinished]

    def _write(self, starts: Sequence[Start], step: int, finished: Finished | None = None) -> list[Trajectory]:
        limit = length_limit(self._config, step)
        portion = self._config.tokens_per_step or limit
        return self._responder.respond(
            [dataclasses.replace(prompt, tokens=prompt.ids + before) for prompt, before in starts],
            max_new_tokens=[min(portion, limit - len(before)) for _, before in starts],
            temperature=self._config.temperature,
            seed=processes.seed(self._seed * 1_000_003 + step),
            finished=finished,
        )

    def _samples(self, starts: Sequence[Start], trajectories: Sequence[Trajectory], step: int) -> list[Sample]:
        limit = length_limit(self._config, step)
        return [self._graded(*start, t, limit) for start, t in zip(starts, trajectories, strict=True)]

    def _left(self, starts: Sequence[Start], trajectories: Sequence[Trajectory], step: int) -> list[dict[str, Any]]:
        """What a step leaves unfinished."""
        limit = length_limit(self._config, step)
        return [
            {"prompt_index": prompt.index, "completion": before + trajectory.token_ids}
            for (prompt, before), trajectory in zip(starts, trajectories, strict=True)
            if self._goes_on(before, trajectory, limit)
        ]

    def _goes_on(self, before: Sequence[int], trajectory: Trajectory, limit: int) -> bool:
        """Whether it is unfinished."""
        length = len(before) + len(trajectory.token_ids)
        return trajectory.truncated and self._config.tokens_per_step is not None and length < limit

    def _sample(self, prompt: EncodedPrompt, before: list[int], trajectory: Trajectory, limit: int) -> Sample:
        """`before` was sampled by older weights: it is context, like the prompt."""
        length, context = len(before) + len(trajectory.token_ids), prompt.ids + before
        sample = Sample(
            ids=np.array(context + trajectory.token_ids, np.int32),
            loss_mask=after_zeros(len(context), np.array(trajectory.counted, np.bool_)),
            prompt_index=prompt.index,
            dataset=prompt.dataset,
            sampler_logprobs=after_zeros(len(context), np.array(trajectory.logprobs, np.float32)),
            completion_length=length,
            feedback=trajectory.feedback,
        )
        sample.unfinished = self._goes_on(before, trajectory, limit)
        sample.truncated = trajectory.truncated and not sample.unfinished
        return sample

    def _graded(self, prompt: EncodedPrompt, before: list[int], trajectory: Trajectory, limit: int) -> Sample:
        sample = self._sample(prompt, before, trajectory, limit)
        if self._judge is not None and not sample.unfinished:
            whole = trajectory._replace(answer_ids=before + trajectory.answer_ids)
            sample.reward = self._judge(whole, prompt)
        return sample


def numbered(samples: list[Sample], places: Sequence[int]) -> list[Sample]:
    """The samples, with these places."""
    for sample, place in zip(samples, places, strict=True):
        sample.place = place
    return samples


def everyones_unfinished(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """What the samples of all processes leave unfinished, in the order of their places. All processes call it."""
    own = [
        Record((sample.place, sample.prompt_index), [sample.ids[sample.prompt_length :]])
        for sample in samples
        if sample.unfinished
    ]
    everyones = sorted(gather(own), key=lambda record: record.head[0])
    return [{"prompt_index": record.head[1], "completion": record.arrays[0].tolist()} for record in everyones]


def on_policy_count(prompts: int, fraction: float, step: int) -> int:
    """How many of a step's prompts the student completes: whole numbers that add up to the fraction over the steps."""
    return math.floor((step + 1) * prompts * fraction + ROUNDING) - math.floor(step * prompts * fraction + ROUNDING)
