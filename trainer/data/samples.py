"""The one list that flows through the trainer: samples, from the prompt to the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np
from torch import Tensor

from fastkl.loss import TopK
from fastkl.trainer.data.arrays import Array, after_zeros, total

UNKNOWN = -50.0  # a teacher's log-prob for what it cannot say: low enough to push it away, and finite


class Completion(NamedTuple):
    """One sampled completion of a prompt."""

    token_ids: list[int]
    """The sampled tokens, with the end-of-sequence token if one was produced."""
    logprobs: list[float]
    """Log-probability of each token under softmax(logits / temperature); temperature 1 when greedy."""
    truncated: bool
    """True when the completion ran out of tokens before an end-of-sequence token."""


Integers: TypeAlias = Annotated[Array, np.int32]
Numbers: TypeAlias = Annotated[Array, np.float32]
Wide: TypeAlias = Annotated[Array, np.float64]
SomeIntegers: TypeAlias = Annotated[Array | None, np.int32]
NO_NUMBERS: Array = np.empty(0, np.float32)


def _nothing() -> Array:
    return NO_NUMBERS


@dataclass(eq=False)
class Sample:
    """A prompt and its completion, token-exact: ids are never decoded and encoded again.

    `loss_mask`, and every array of numbers, is aligned with `ids`; entries where the mask is False (the prompt) mean
    nothing and are 0. An array is empty where nothing is known. What a teacher writes has a name that begins with
    `teacher_`.

    The annotation of an array's field names its dtype: a sequence that is written there becomes such an array. Samples may
    share arrays: write a new one, never into one.
    """

    ids: Integers
    loss_mask: Annotated[Array, np.bool_]
    prompt_index: int  # which row of the data it comes from; of several data sets, all of them end to end
    dataset: str = ""  # which data set of a mixture
    truncated: bool = False  # the completion was cut at the length limit
    sampler_logprobs: Numbers = field(default_factory=_nothing)
    teacher_logprobs: Numbers = field(default_factory=_nothing)
    old_logprobs: Numbers = field(default_factory=_nothing)  # what the ratio is taken against; empty: current policy
    student_logprobs: Numbers = field(default_factory=_nothing)  # before the update, where older weights sampled
    student_entropies: Numbers = field(default_factory=_nothing)  # of its distribution before the update, nats
    reference_logprobs: Numbers = field(default_factory=_nothing)
    kl_baseline: Numbers = field(default_factory=_nothing)  # what is taken off the KL; `loss.baseline: kl`
    advantages: Numbers = field(default_factory=_nothing)
    tail_gaps: Numbers = field(default_factory=_nothing)  # log p − log q − ρ outside `teacher_top_k`; NaN on it
    student_ranks: Integers = field(default_factory=_nothing)  # 1: its likeliest token; 0: no token of the tokenizer
    teacher_ranks: Integers = field(default_factory=_nothing)
    reward: float | None = None  # None: not graded
    feedback: str | None = None  # what an environment said of it to the teacher alone
    reward_advantage: float = 0.0  # of each counted token, beside the KL's
    given: bool = False  # the completion stands in the data; the student did not sample it
    unfinished: bool = False  # goes on in the next step
    staleness: int = 0  # steps that the student has taken since it wrote the sample
    completion_length: int = 0  # tokens after the prompt, of earlier steps and of the environment too
    weights: Wide = field(default_factory=_nothing)  # how much each token counts in the loss; empty: all count 1
    student_top_k: Tensor | None = None  # ids that the teacher shall score too, [n, k] int32 on the CPU
    teacher_top_k: TopK | None = None  # of the counted tokens, [n, k] on the CPU, ids int32; an id of −1 pads
    teacher_prompt: SomeIntegers = None  # what the teacher reads before the completion; None: the student's prompt
    # Of a teacher with its own tokenizer: the completion in its tokens; None: it reads the student's.
    teacher_completion: SomeIntegers = None
    # Which stretch that both begin and end alike a token is of, counted from 1; 0: of none. Empty: each token is its own.
    segments: Integers = field(default_factory=_nothing)
    teacher_segments: Integers = field(default_factory=_nothing)  # the same of `teacher_completion`, entry by entry
    # How many tokens before it a token answers for too: where their segments end may depend on it. Empty: for none.
    answers_back: Integers = field(default_factory=_nothing)
    teacher_completion_logprobs: Numbers = field(default_factory=_nothing)
    teacher_completion_ranks: Integers = field(default_factory=_nothing)
    teacher_cached: bool | None = None  # its scores were there already; None: it has no cache
    plain_logprobs: Numbers = field(default_factory=_nothing)  # the teacher's, had it read what the student read
    place: int = 0  # among all samples of the step, on all processes

    def __setattr__(self, name: str, value: Any) -> None:
        dtype = ARRAYS.get(name)
        if dtype is not None and value is not None:
            value = np.asarray(value, dtype) if len(value) else EMPTY[dtype]
        object.__setattr__(self, name, value)

    @property
    def loss_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_mask))

    @property
    def weight(self) -> float:
        """What all tokens together count in the loss."""
        return total(self.weights) if len(self.weights) else self.loss_tokens

    @property
    def weighed_tokens(self) -> int:
        """The tokens that count in the loss for more than 0."""
        return int(np.count_nonzero(self.weights)) if len(self.weights) else self.loss_tokens

    @property
    def prompt_length(self) -> int:
        return len(self.ids) - self.completion_length

    @property
    def scored(self) -> Array:
        """[T] bool: the counted tokens about which a teacher can say something."""
        return self.loss_mask & (self.segments > 0) if len(self.segments) else self.loss_mask

    @property
    def teacher_scored(self) -> Array:
        """bool: the same of `teacher_completion`, entry by entry."""
        return np.isin(self.teacher_segments, self.segments[self.scored])

    @property
    def compared(self) -> Array:
        """[T] bool: the counted tokens at whose beginning a teacher's distribution can be compared.

        One with its own tokenizer begins a token there, after the same text, and says something of a token of the student.
        """
        if not len(self.segments):
            return self.loss_mask
        found = self.loss_mask & _begins(self.segments)
        if self.teacher_top_k is not None:
            found[self.loss_mask] &= (self.teacher_top_k.ids[:, 0] >= 0).numpy()
        return found

    @property
    def teacher_compared(self) -> Array:
        """bool: which entries of `teacher_completion` begin where the student begins a counted token."""
        return self.teacher_scored & _begins(self.teacher_segments)

    @property
    def teacher_scores(self) -> Array:
        """The log-probs that the teacher gave, of its own tokens where it has some; empty where it was not asked."""
        if self.teacher_completion is not None and len(self.teacher_completion_logprobs):
            return self.teacher_completion_logprobs[self.teacher_scored]
        return self.teacher_logprobs[self.loss_mask] if len(self.teacher_logprobs) else NO_NUMBERS

    def for_teacher(self) -> Sample:
        """The sample as its teacher reads it: after its own prompt, the same completion with the same tokens that count.

        Of a teacher with its own tokenizer, the completion in its tokens; those that count are of segments that count.
        The sample itself where the teacher has no prompt of its own. All other arrays are empty.
        """
        if self.teacher_prompt is None:
            return self
        own, completion, counted = self.teacher_prompt, self.ids[self.prompt_length :], self.loss_mask
        counted = counted[self.prompt_length :]
        if self.teacher_completion is not None:
            completion, counted = self.teacher_completion, self.teacher_scored
        changed: dict[str, Any] = dict.fromkeys(ARRAYS, ()) | dict.fromkeys(("teacher_prompt", "teacher_completion"))
        changed["ids"] = np.concatenate([own, completion])
        changed["loss_mask"] = after_zeros(len(own), counted)
        return dataclasses.replace(self, **changed, completion_length=len(completion))

    def take_scores(self, read: Sample) -> None:
        """What the teacher wrote into the sample that it read, beside the tokens of this one.

        Of a teacher with its own tokenizer, a token gets an equal part of what its segment got, and a rank where the
        segment is one token of both.
        """
        if self.teacher_completion is not None:
            self._take_segments(read)
            return
        for each in dataclasses.fields(self):
            value = getattr(read, each.name)
            if not each.name.startswith("teacher_") or value is None:
                continue
            if each.name not in ARRAYS:
                setattr(self, each.name, value)
            elif len(value):  # 0 for every token of a prompt
                setattr(self, each.name, after_zeros(self.prompt_length, value[read.prompt_length :]))

    def _take_segments(self, read: Sample) -> None:
        start, own, theirs = read.prompt_length, self.segments, self.teacher_segments
        size = 1 + max(own.max(initial=0), theirs.max(initial=0))
        counts, their_counts = np.bincount(own, minlength=size), np.bincount(theirs, minlength=size)
        if len(read.teacher_logprobs):
            self.teacher_completion_logprobs = read.teacher_logprobs[start:]
            sums = np.bincount(theirs, self.teacher_completion_logprobs.astype(np.float64), size)
            self.teacher_logprobs = np.where(self.scored, (sums / np.maximum(counts, 1))[own], 0.0)
        if len(read.teacher_ranks):
            self.teacher_completion_ranks = read.teacher_ranks[start:]
            ranks = np.bincount(theirs, self.teacher_completion_ranks, size)
            self.teacher_ranks = np.where(self.scored & ((counts == 1) & (their_counts == 1))[own], ranks[own], 0)
        self.teacher_cached = read.teacher_cached


ARRAYS: dict[str, np.dtype[Any]] = {
    name: np.dtype(hint.__metadata__[0])
    for name, hint in get_type_hints(Sample, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
"""The fields that hold arrays, with their dtypes."""

EMPTY = {dtype: np.empty(0, dtype) for dtype in ARRAYS.values()}  # one for all samples of which nothing is known


def _begins(segments: Array) -> Array:
    """bool: which entries are the first of their segment."""
    return (segments > 0) & (np.diff(segments, prepend=np.int32(0)) != 0)


OURS = ("student_logprobs", "old_logprobs", "sampler_logprobs")
"""Whose log-probs the KL is taken of: the first of them that is known."""


def known_array(sample: Sample, *fields: str) -> Array:
    """The first of these arrays that the sample has; an empty one if it has none."""
    return next((array for field in fields if len(array := getattr(sample, field))), NO_NUMBERS)


def make_sample(
    prompt: Sequence[int] | Array,
    completion: Sequence[int] | Array,
    prompt_index: int,
    logprobs: Sequence[float] | Array | None = None,
    truncated: bool = False,
    dataset: str = "",
) -> Sample:
    """A sample of one turn: the prompt is context, every token of the completion counts."""
    ids, length = [np.asarray(part, np.int32) for part in (prompt, completion)], len(completion)
    return Sample(
        ids=np.concatenate(ids),
        loss_mask=after_zeros(len(prompt), np.ones(length, np.bool_)),
        prompt_index=prompt_index,
        dataset=dataset,
        truncated=truncated,
        completion_length=length,
        sampler_logprobs=NO_NUMBERS if logprobs is None else after_zeros(len(prompt), np.asarray(logprobs, np.float32)),
    )
