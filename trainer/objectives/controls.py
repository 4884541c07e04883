"""`loss.control`: what tells whether the teacher mattered. The teacher's scores are put in the place of something else.

- shuffled: the scores of a data set's tokens in a step, end to end, are turned by half their number. A score is the
  student's and the teacher's log-prob of a token, for top_k the list of its place. Each is used once, so their distribution
  is the same. A token gets that of another sample, as long as no sample has more than half of the data set's tokens.
- no_teacher: the teacher agrees with the student, but for a fixed gap at the student's unlikeliest tokens. Ding and Zhang,
  "Does On-Policy Distillation Really Distill?" (2026, arXiv 2608.31046), section 3.2: there an advantage of −0.5 at the
  20 % of the sampled tokens with the lowest log-probs came near to distillation.

Both leave `teacher_logprobs` as they are: metrics and reports show what the teacher says.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastkl.loss import TopK
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.arrays import Array, end_to_end
from fastkl.trainer.data.samples import NO_NUMBERS, OURS, Sample, known_array
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.sharing.ranked import ranked
from fastkl.trainer.runs.sharing.records import Record, move, sum_arrays

# Of a sample: what its advantages are made of.
SCORES = (
    "student_logprobs",
    "sampler_logprobs",
    "old_logprobs",
    "teacher_logprobs",
    "reference_logprobs",
    "kl_baseline",
)


def with_scores(samples: list[Sample], config: LossConfig) -> list[Sample]:
    """This process's samples as the advantages see them: themselves, or copies with a control's scores.

    Given completions are themselves: no advantage is made of their scores. All processes call it.
    """
    own = [sample for sample in samples if not sample.given]
    if config.control == "shuffled":
        judged = _shuffled(own)
    elif config.control == "no_teacher":
        judged = _penalised(own, config.control_penalty, config.control_share)
    else:
        return samples
    remaining = iter(judged)
    return [sample if sample.given else next(remaining) for sample in samples]


def _shuffled(samples: list[Sample]) -> list[Sample]:
    parts = [np.stack([_counted(sample, getattr(sample, name)) for name in SCORES], -1) for sample in samples]
    return [
        _with(sample, dict(zip(SCORES, scores.T, strict=True)))
        for sample, scores in zip(samples, turned(samples, parts), strict=True)
    ]


def _penalised(samples: list[Sample], penalty: float, share: float) -> list[Sample]:
    ours = [_counted(sample, known_array(sample, *OURS)) for sample in samples]
    return [
        dataclasses.replace(
            sample,
            teacher_logprobs=_placed(sample, own.astype(np.float64) - penalty * chosen),
            segments=NO_NUMBERS,
        )
        for sample, own, chosen in zip(samples, ours, lowest(samples, ours, share), strict=True)
    ]


def shuffle_lists(samples: Sequence[Sample]) -> None:
    """Turns the teacher's likeliest tokens of this process's samples, as `shuffled` does. All processes call it."""
    scored = [sample for sample in samples if sample.teacher_top_k is not None]
    lists = [sample.teacher_top_k for sample in scored if sample.teacher_top_k is not None]
    ids, logprobs = (turned(scored, [own[i].numpy() for own in lists]) for i in (0, 1))
    for sample, *own in zip(scored, ids, logprobs, strict=True):
        sample.teacher_top_k = TopK(*map(torch.from_numpy, own))


def turned(samples: Sequence[Sample], parts: Sequence[Array]) -> list[Array]:
    """Rows for rows [n, …] of samples: of all processes' of a data set, end to end, those half their number further on.

    Each row goes to the process of the sample that gets it, and nowhere else.
    """
    keys = _keys(samples)
    mine = [(s.dataset, key, len(part)) for s, key, part in zip(samples, keys, parts, strict=True)]
    everyones = itertools.groupby(sorted(processes.gather(mine)), key=lambda each: each[0])
    lines = {name: _Line([each[1:] for each in own]) for name, own in everyones}
    going = [
        (Record((of.number, first), [part[rows]]), of.rank)
        for sample, key, part in zip(samples, keys, parts, strict=True)
        for of, first, rows in lines[sample.dataset].turned(key)
    ]
    coming: dict[int, list[tuple[int, Array]]] = defaultdict(list)
    for record in move([record for record, _ in going], [rank for _, rank in going]):
        index, first = record.head
        coming[index].append((first, record.arrays[0]))
    ordered = [sorted(coming[index], key=lambda piece: piece[0]) for index in range(len(samples))]
    return [
        np.concatenate([piece for _, piece in own]) if own else part for own, part in zip(ordered, parts, strict=True)
    ]


class _Key(NamedTuple):
    """A sample among those of all processes, in their order."""

    place: int
    rank: int
    number: int  # among those of the process


def _keys(samples: Sequence[Sample]) -> list[_Key]:
    return [_Key(sample.place, processes.rank(), index) for index, sample in enumerate(samples)]


class _Line:
    """The rows of a data set's samples, on all processes, end to end. `lengths`: of each sample, in order."""

    def __init__(self, lengths: Sequence[tuple[_Key, int]]) -> None:
        self._keys = [key for key, _ in lengths]
        self._starts = [0, *itertools.accumulate(length for _, length in lengths)]

    def turned(self, key: _Key) -> Iterator[tuple[_Key, int, slice]]:
        """The parts of a sample's rows: who gets one, from which row of its own on, and which rows they are."""
        at, count = bisect.bisect_left(self._keys, key), self._starts[-1]
        length, done = self._starts[at + 1] - self._starts[at], 0
        while done < length:
            first = (self._starts[at] + done - count // 2) % count
            to = bisect.bisect_right(self._starts, first) - 1
            rows = slice(done, min(length, done + self._starts[to + 1] - first))
            yield self._keys[to], first - self._starts[to], rows
            done = rows.stop


def lowest(samples: Sequence[Sample], parts: Sequence[Array], share: float) -> list[Array]:
    """bool [n] of values [n] of each sample: the ⌈share · N⌉ lowest of all processes' N; of equal ones the first."""
    values = end_to_end(parts, np.float32)
    count = int(sum_arrays(np.array([len(values)]))[0])
    if not count:
        return [part < 0 for part in parts]
    wanted = math.ceil(share * count)
    (limit,) = ranked(values, [wanted - 1])
    left = wanted - int(sum_arrays(np.array([np.count_nonzero(values < limit)]))[0])
    keys = _keys(samples)
    equal = [(key, int(np.count_nonzero(part == limit))) for key, part in zip(keys, parts, strict=True)]
    everyones = sorted(processes.gather(equal))
    so_far = dict(zip((key for key, _ in everyones), itertools.accumulate(n for _, n in everyones), strict=True))
    return [
        (part < limit) | ((part == limit) & ((part == limit).cumsum() <= left - so_far[key] + own))
        for (key, own), part in zip(equal, parts, strict=True)
    ]


def _with(sample: Sample, scores: dict[str, Array]) -> Sample:
    """A copy with these scores of its counted tokens, of those lists that it has."""
    changed = copy.copy(sample)
    for name, values in scores.items():
        if len(getattr(sample, name)):
            setattr(changed, name, _placed(sample, values))
    return changed


def _counted(sample: Sample, values: Array) -> Array:
    """[n] float32 of the counted tokens; 0 where nothing is known."""
    return values[sample.loss_mask] if len(values) else np.zeros(sample.loss_tokens, np.float32)


def _placed(sample: Sample, values: Array) -> Array:
    """Values [n] of the counted tokens, among zeros."""
    row = np.zeros(len(sample.loss_mask))
    row[sample.loss_mask] = values
    return row
