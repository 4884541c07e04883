"""How many tokens a teacher with its own tokenizer reads, where the student's are known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import after_zeros
from fastkl.trainer.data.mixture import DataSet
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.text import encode
from fastkl.trainer.teachers.context.prompts import TeacherPrompts

ROWS = 200  # whose texts are read by both


class Growth(NamedTuple):
    """The teacher's tokens for one of the student's."""

    prompt: float
    completion: float

    def __str__(self) -> str:
        return f"{self.prompt:.2f} tokens for one of the student's in prompts, {self.completion:.2f} in completions"

    def write(self, sample: Sample) -> None:
        """What the teacher reads of a sample, in so many tokens; its prompt as it is, where that is known."""
        new, theirs = sample.completion_length, math.ceil(self.completion * sample.completion_length)
        if sample.teacher_prompt is None:
            sample.teacher_prompt = np.zeros(math.ceil(self.prompt * sample.prompt_length), np.int32)
        sample.teacher_completion = np.zeros(theirs, np.int32)
        sample.segments = after_zeros(sample.prompt_length, np.ones(new, np.int32))
        sample.teacher_segments = np.ones(theirs, np.int32)


def growths(
    data_sets: Sequence[DataSet], read: TeacherPrompts, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Growth]:
    """Of the data sets whose teachers have their own tokenizers, by name.

    Completions are taken to grow as the data's own do, or its questions where there are none. `tokenizer` is the student's.
    """
    found = {}
    for data_set, theirs in zip(data_sets, read.data_sets, strict=True):
        if data_set.name not in read.own:
            continue
        prompts = data_set.prompts[:ROWS]
        texts = [str(prompt.row.completion or prompt.row.turns[-1]["content"]) for prompt in prompts]
        readers = tokenizer, read.reader(data_set.name).tokenizer
        found[data_set.name] = Growth(
            _ratio([each.tokens for each in prompts], [each.tokens for each in theirs.prompts[:ROWS]]),
            _ratio(*(encode(reader, texts) for reader in readers)),
        )
    return found


def lines_of(found: Mapping[str, Growth]) -> Iterator[str]:
    """For a reader, by data set."""
    for name, growth in found.items():
        yield f"the teacher{name and f' of {name}'} reads {growth}, as in texts of the data; all counts have them"


def _ratio(ours: Iterable[Sequence[int]], theirs: Iterable[Sequence[int]]) -> float:
    return sum(map(len, theirs)) / max(1, sum(map(len, ours)))
