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

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastkl.loss import TopK
from fastkl.trainer.config.loss import LossConfig
from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.samples import NO_NUMBERS, OURS, Sample, known_array
from fastkl.trainer.objectives.weights.shares import largest
from fastkl.trainer.runs import processes

# Of a sample: what its advantages are made of.
SCORES = (
    "student_logprobs",
    "sampler_logprobs",
    "old_logprobs",
    "teacher_logprobs",
    "reference_logprobs",
    "kl_baseline",
)
T = TypeVar("T")


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
    parts = [torch.stack([_counted(sample, getattr(sample, name)) for name in SCORES], -1) for sample in samples]
    found = turned(parts, [sample.dataset for sample in samples])
    return [
        _with(sample, dict(zip(SCORES, scores.unbind(-1), strict=True)))
        for sample, scores in zip(samples, found, strict=True)
    ]


def _penalised(samples: list[Sample], penalty: float, share: float) -> list[Sample]:
    ours = [_counted(sample, known_array(sample, *OURS)) for sample in samples]
    return [
        dataclasses.replace(sample, teacher_logprobs=_placed(sample, own - penalty * chosen), segments=NO_NUMBERS)
        for sample, own, chosen in zip(samples, ours, lowest(ours, share), strict=True)
    ]


def shuffle_lists(samples: Sequence[Sample]) -> None:
    """Turns the teacher's likeliest tokens of this process's samples, as `shuffled` does. All processes call it."""
    found = [sample.teacher_top_k for sample in samples if sample.teacher_top_k is not None]
    names = [sample.dataset for sample in samples if sample.teacher_top_k is not None]
    lists = [turned(list(parts), names) for parts in (zip(*found, strict=True) if found else ((), ()))]
    scored = (sample for sample in samples if sample.teacher_top_k is not None)
    for sample, ids, logprobs in zip(scored, *lists, strict=True):
        sample.teacher_top_k = TopK(ids, logprobs)


def turned(parts: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """Rows for rows, [n, …] each: of all processes' parts of a name, end to end, those half their number further on."""

    def turn(everyone: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        result: dict[int, Tensor] = {}
        for name in dict.fromkeys(name for name, _ in everyone):
            members = [index for index, (other, _) in enumerate(everyone) if other == name]
            rows = torch.cat([everyone[index][1] for index in members])
            pieces = rows.roll(-(len(rows) // 2), 0).split([len(everyone[index][1]) for index in members])
            result |= dict(zip(members, pieces, strict=True))
        return [result[index] for index in range(len(everyone))]

    return _together(list(zip(names, parts, strict=True)), turn)


def lowest(parts: Sequence[Tensor], share: float) -> list[Tensor]:
    """bool, [n] each: the ⌈share · N⌉ lowest of the N values of all processes; of equal ones the first."""

    def choose(everyone: Sequence[Tensor]) -> list[Tensor]:
        return list(largest(-torch.cat(list(everyone)), share).split([len(part) for part in everyone]))

    return _together(list(parts), choose)


def _together(mine: list[T], function: Callable[[list[T]], list[Tensor]]) -> list[Tensor]:
    """This process's part of what a function makes of all processes' items."""
    everyone = processes.gather([mine])
    first = sum(len(own) for own in everyone[: processes.rank()])
    items = [item for own in everyone for item in own]
    return function(items)[first : first + len(mine)] if items else []


def _with(sample: Sample, scores: dict[str, Tensor]) -> Sample:
    """A copy with these scores of its counted tokens, of those lists that it has."""
    changed = copy.copy(sample)
    for name, values in scores.items():
        if len(getattr(sample, name)):
            setattr(changed, name, _placed(sample, values))
    return changed


def _counted(sample: Sample, values: Array) -> Tensor:
    """[n] float64 of the counted tokens; 0 where nothing is known."""
    known = values[sample.loss_mask] if len(values) else np.zeros(sample.loss_tokens)
    return torch.from_numpy(known.astype(np.float64))


def _placed(sample: Sample, values: Tensor) -> Array:
    """Values [n] of the counted tokens, among zeros."""
    row = np.zeros(len(sample.loss_mask))
    row[sample.loss_mask] = values.numpy()
    return row
