"""The one list that flows through the trainer: samples, from the prompt to the loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from fastkl.loss import TopK

UNKNOWN = -50.0  # a teacher's log-prob for what it cannot say: low enough to push it away, and finite


class Completion(NamedTuple):
    """One sampled completion of a prompt."""

    token_ids: list[int]
    """The sampled tokens, with the end-of-sequence token if one was produced."""
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature); temperature 1 when greedy."""
    truncated: bool
    """True when the completion ran out of tokens before an end-of-sequence token."""


@dataclass
class Sample:
    """A prompt and its completion, token-exact: ids are never decoded and encoded again.

    `loss_mask`, and every list of numbers, is aligned with `ids`; entries where the mask is False (the prompt) mean nothing
    and are 0. A list is empty where nothing is known. What a teacher writes has a name that begins with `teacher_`.
    """

    ids: list[int]
    loss_mask: list[bool]
    prompt_index: int  # which row of the data it comes from; of several data sets, all of them end to end
    dataset: str = ""  # which data set of a mixture
    truncated: bool = False  # the completion was cut at the length limit
    sampler_logprobs: list[float] = field(default_factory=list)
    teacher_logprobs: list[float] = field(default_factory=list)
    old_logprobs: list[float] = field(default_factory=list)  # what the ratio is taken against; empty: current policy
    student_logprobs: list[float] = field(default_factory=list)  # before the update, where older weights sampled
    student_entropies: list[float] = field(default_factory=list)  # of its distribution before the update, nats
    reference_logprobs: list[float] = field(default_factory=list)
    kl_baseline: list[float] = field(default_factory=list)  # what is taken off the KL; `loss.baseline: kl`
    advantages: list[float] = field(default_factory=list)
    tail_gaps: list[float] = field(default_factory=list)  # log p − log q − ρ outside `teacher_top_k`; NaN on it
    student_ranks: list[int] = field(default_factory=list)  # 1: its likeliest token; 0: no token of the tokenizer
    teacher_ranks: list[int] = field(default_factory=list)
    reward: float | None = None  # None: not graded
    feedback: str | None = None  # what an environment said of it to the teacher alone
    reward_advantage: float = 0.0  # of each counted token, beside the KL's
    given: bool = False  # the completion stands in the data; the student did not sample it
    unfinished: bool = False  # goes on in the next step
    staleness: int = 0  # steps that the student has taken since it wrote the sample
    completion_length: int = 0  # tokens after the prompt, of earlier steps and of the environment too
    weights: list[float] = field(default_factory=list)  # how much each token counts in the loss; empty: all count 1
    student_top_k: Tensor | None = None  # ids that the teacher shall score too, [n, k] on the CPU
    teacher_top_k: TopK | None = None  # of the counted tokens, [n, k] on the CPU; an id of −1 pads
    teacher_prompt: list[int] | None = None  # what the teacher reads before the completion; None: the student's prompt
    teacher_cached: bool | None = None  # its scores were there already; None: it has no cache
    plain_logprobs: list[float] = field(default_factory=list)  # the teacher's, had it read what the student read

    @property
    def loss_tokens(self) -> int:
        return sum(self.loss_mask)

    @property
    def weight(self) -> float:
        """What all tokens together count in the loss."""
        return sum(self.weights) if self.weights else self.loss_tokens

    @property
    def weighed_tokens(self) -> int:
        """The tokens that count in the loss for more than 0."""
        return sum(weight != 0 for weight in self.weights) if self.weights else self.loss_tokens

    @property
    def prompt_length(self) -> int:
        return len(self.ids) - self.completion_length

    def for_teacher(self) -> Sample:
        """The sample as its teacher reads it: after its own prompt, the same completion with the same tokens that count.

        The sample itself where the teacher has no prompt of its own. All other lists that are aligned with `ids` are empty.
        """
        if self.teacher_prompt is None:
            return self
        lists = [each.name for each in dataclasses.fields(self) if isinstance(getattr(self, each.name), list)]
        changed: dict[str, Any] = {name: [] for name in lists}
        changed["ids"] = self.teacher_prompt + self.ids[self.prompt_length :]
        changed["loss_mask"] = [False] * len(self.teacher_prompt) + self.loss_mask[self.prompt_length :]
        return dataclasses.replace(self, **(changed | {"teacher_prompt": None}))

    def take_scores(self, read: Sample) -> None:
        """What the teacher wrote into the sample that it read, beside the tokens of this one."""
        for each in dataclasses.fields(self):
            value = getattr(read, each.name)
            if not each.name.startswith("teacher_") or value is None or value == []:  # that it did not write
                continue
            if isinstance(value, list):  # 0 for every token of a prompt
                value = value[:1] * self.prompt_length + value[read.prompt_length :]
            setattr(self, each.name, value)


def make_sample(
    prompt: list[int],
    completion: list[int],
    prompt_index: int,
    logprobs: list[float] | None = None,
    truncated: bool = False,
    dataset: str = "",
) -> Sample:
    """A sample of one turn: the prompt is context, every token of the completion counts."""
    return Sample(
        ids=[*prompt, *completion],
        loss_mask=[False] * len(prompt) + [True] * len(completion),
        prompt_index=prompt_index,
        dataset=dataset,
        truncated=truncated,
        completion_length=len(completion),
        sampler_logprobs=[] if logprobs is None else [0.0] * len(prompt) + logprobs,
    )
