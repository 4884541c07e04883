"""What answers prompts: one completion, or a conversation of several turns (`multi_turn.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Completion
from fastkl.trainer.rollouts.samplers.sampler import Sampler
from fastkl.trainer.runs import processes

T = TypeVar("T")

_ROUND = 1 << 40  # between the seeds of two calls of one step; steps count up from seed · 1 000 003


class Trajectory(NamedTuple):
    """What follows a prompt, token-exact. The three lists are aligned; a token that was not sampled has log-prob 0."""

    token_ids: list[int]
    counted: list[bool]  # sampled by the student: the environment's tokens are context
    logprobs: list[float]
    truncated: bool
    answer_ids: list[int]  # what is graded: the student's last message
    reward: float | None = None  # the environment's
    feedback: str | None = None  # the environment's, for the teacher


Finished = Callable[[int, Trajectory], None]
"""Is told a trajectory and the place of its prompt, by any thread."""


class Responder(Protocol):
    """One trajectory per prompt, in order; the same ones for the same weights and seed. Temperature 0 is greedy."""

    def my_share(self, items: Sequence[T]) -> list[T]:
        """Those of all processes' prompts that this process has to write."""
        ...

    def respond(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        seed: int,
        finished: Finished | None = None,
    ) -> list[Trajectory]:
        """`max_new_tokens[i]` bounds all that follows prompt i.

        With a sampler that is a server, `finished` is told each trajectory as soon as it is whole. It may be told again.
        """
        ...


class SingleTurn:
    """One completion per prompt.

    Args:
        sampler: Completes token ids.
        context: The most positions that the sampler's model has; None: no limit.
    """

    def __init__(self, sampler: Sampler, context: int | None) -> None:
        self._sampler, self._context = sampler, context

    def my_share(self, items: Sequence[T]) -> list[T]:
        return sampling_share(self._sampler, items)

    def respond(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        max_new_tokens: Sequence[int],
        temperature: float,
        seed: int,
        finished: Finished | None = None,
    ) -> list[Trajectory]:
        completions = sample_within(
            self._sampler,
            [prompt.ids for prompt in prompts],
            max_new_tokens,
            context=self._context,
            temperature=temperature,
            seed=seed,
            finished=None if finished is None else lambda place, completion: finished(place, _one_turn(completion)),
        )
        return [_one_turn(completion) for completion in completions]


def _one_turn(completion: Completion) -> Trajectory:
    ids, logprobs, truncated = completion
    return Trajectory(ids, [True] * len(ids), logprobs, truncated, ids)


def sampling_share(sampler: Sampler, items: Sequence[T]) -> list[T]:
    """This process's part of what all processes have to sample."""
    return processes.my_share(items) if sampler.shared else processes.first_alone(items)


def sample_within(
    sampler: Sampler,
    prompts: Sequence[list[int]],
    budgets: Sequence[int],
    *,
    context: int | None,
    temperature: float,
    seed: int,
    finished: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """Completions of at most `budgets[i]` tokens each; each prompt and its budget fit `context`.

    A sampler has one limit for all. It is asked for the largest that fits every prompt, and what is too long is cut: the
    beginning of a sample is a sample. The few that are still short of their own budget go on in another call. A server's
    sampler tells of each as soon as it is there, and `finished` is told of those that do not go on.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    truncated = [True] * len(prompts)
    active, calls = list(range(len(prompts))), 0

    def joined(place: int, new: Completion) -> Completion:
        """What is there of a prompt's completion with what was sampled last."""
        left = budgets[place] - len(tokens[place])
        cut = new.truncated or len(new.token_ids) > left
        return Completion(tokens[place] + new.token_ids[:left], logprobs[place] + new.logprobs[:left], cut)

    def arrived(number: int, new: Completion) -> None:
        whole = joined(place := active[number], new)
        if finished is not None and not (whole.truncated and new.token_ids and len(whole.token_ids) < budgets[place]):
            finished(place, whole)

    telling: dict[str, Any] = {} if finished is None else {"arrived": arrived}
    while active:
        asked = max(budgets[i] - len(tokens[i]) for i in active)
        if context is not None:
            asked = min(asked, context - max(len(prompts[i]) + len(tokens[i]) for i in active))
        new = sampler.sample(
            [prompts[i] + tokens[i] for i in active],
            max_new_tokens=asked,
            temperature=temperature,
            seed=round_seed(seed, calls),
            **telling,
        )
        for i, completion in zip(active, new, strict=True):
            tokens[i], logprobs[i], truncated[i] = joined(i, completion)
        grown = [i for i, completion in zip(active, new, strict=True) if completion.token_ids]  # or it would never end
        active = [i for i in grown if truncated[i] and len(tokens[i]) < budgets[i]]
        calls += 1
    return [Completion(*parts) for parts in zip(tokens, logprobs, truncated, strict=True)]


def round_seed(seed: int, round: int) -> int:
    """The seed of a further call within one step: no other step's, and the step's own for the first."""
    return seed + round * _ROUND
