"""samples.jsonl: how its lines are written, and how they are found again in a file that may be larger than memory."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.samples import Sample

NAME = "samples.jsonl"
# Of the update alone, and lists that would be most of the file.
UNLOGGED: dict[str, Any] = {"student_logprobs": (), "tail_gaps": (), "student_top_k": None, "teacher_top_k": None}
LEFT_OUT = (*UNLOGGED, "teacher_cached", "place")  # whether a cache spared the teacher changes no sample
# Of a teacher with its own tokenizer.
OWN = (
    "teacher_completion",
    "segments",
    "teacher_segments",
    "teacher_completion_logprobs",
    "teacher_completion_ranks",
    "answers_back",
)
LINE = re.compile(rb'\{"step": (\d+),')  # how a line begins

Line = tuple[int, int]  # where it begins in its file, and its length


def sample_records(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    step: int,
    own: Mapping[str, PreTrainedTokenizerBase] = MappingProxyType({}),
) -> Iterator[dict[str, object]]:
    """What the log holds of a step's samples: the step (first: see LINE), texts, and all fields but `LEFT_OUT`, and
    the staleness of what is stale.

    Of a teacher's own prompt, its text too; and of its own tokenizer (`own`, by data set), what it makes of the completion.
    """
    for sample in samples:
        read, completion = sample.teacher_prompt, sample.teacher_completion
        theirs = own.get(sample.dataset, tokenizer)
        left_out = LEFT_OUT if sample.staleness else (*LEFT_OUT, "staleness")
        left_out = left_out if completion is not None else (*left_out, *OWN)
        yield {
            "step": step,
            "text": tokenizer.decode(sample.ids),
            "tokens": [tokenizer.decode([token]) for token in sample.ids.tolist()],
            **({} if read is None else {"teacher_text": theirs.decode(read)}),
            **(
                {}
                if completion is None
                else {"teacher_tokens": [theirs.decode([token]) for token in completion.tolist()]}
            ),
            **{name: _plain(value) for name, value in vars(sample).items() if name not in left_out},
        }


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def find_records(file: Path) -> dict[int, list[Line]]:
    """Where the samples of each step are; nothing where there is no file."""
    lines: dict[int, list[Line]] = defaultdict(list)
    if not file.is_file():
        return lines
    position = 0
    with open(file, "rb") as log:
        for line in log:
            begins = LINE.match(line)
            if begins and line.endswith(b"}\n"):  # a line that a crash cut short has no end
                lines[int(begins[1])].append((position, len(line)))
            position += len(line)
    return lines


def read_records(file: Path, lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as log:
        for position, length in lines:
            log.seek(position)
            yield json.loads(log.read(length).decode("utf-8", errors="replace"))
