"""samples.jsonl: how its lines are written, and how they are found again in a file that may be larger than memory."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.samples import Sample

NAME = "samples.jsonl"
# Of the update alone, and lists that would be most of the file; whether a cache spared the teacher changes no sample.
LEFT_OUT = ("student_logprobs", "student_top_k", "teacher_top_k", "tail_gaps", "teacher_cached")
LINE = re.compile(rb'\{"step": (\d+),')  # how a line begins

Line = tuple[int, int]  # where it begins in its file, and its length


def sample_records(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, step: int
) -> Iterator[dict[str, object]]:
    """What the log holds of a step's samples: the step (first: see LINE), texts, and all fields but `LEFT_OUT`, and
    the staleness of what is stale.

    Of a teacher's own prompt, its text too.
    """
    for sample in samples:
        read = sample.teacher_prompt
        left_out = LEFT_OUT if sample.staleness else (*LEFT_OUT, "staleness")
        yield {
            "step": step,
            "text": tokenizer.decode(sample.ids),
            "tokens": [tokenizer.decode([token]) for token in sample.ids.tolist()],
            **({} if read is None else {"teacher_text": tokenizer.decode(read)}),
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
