"""Samples on their way from one process to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fastkl.loss import TopK
from fastkl.trainer.data.samples import ARRAYS, Sample
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.report.samples_log import UNLOGGED
from fastkl.trainer.runs.sharing.records import Record, move

LISTS = ("student_top_k", "teacher_top_k.ids", "teacher_top_k.logprobs")  # tensors [n, k]
OPTIONAL = {each.name for each in dataclasses.fields(Sample) if each.default is None}  # an empty array says something
PLAIN = [
    each.name for each in dataclasses.fields(Sample) if each.name not in {*ARRAYS, "student_top_k", "teacher_top_k"}
]


def move_samples(samples: Sequence[Sample], to: Sequence[int]) -> list[Sample]:
    """Gives each sample to a process: those that are here then. All processes call it."""
    if processes.count() == 1:
        return list(samples)
    pairs = list(zip(samples, to, strict=True))
    leaving = [(as_record(sample), target) for sample, target in pairs if target != processes.rank()]
    coming = move([record for record, _ in leaving], [target for _, target in leaving])
    return [sample for sample, target in pairs if target == processes.rank()] + list(map(as_sample, coming))


def lent(sample: Sample | None, have: Sequence[bool]) -> Sample | None:
    """This process's sample, or where it has none, that of the first process that has one. `have`: who has one.

    All processes call it.
    """
    if all(have) or not any(have):
        return sample
    lends = sample is not None and processes.rank() == have.index(True)
    lacking = [rank for rank, has in enumerate(have) if lends and not has]
    coming = move([as_record(sample) for _ in lacking if sample is not None], lacking)
    return as_sample(coming[0]) if coming else sample


def first_samples(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Of all processes' samples the first `count`, by their places: on the first process, as `samples.jsonl` has them.

    All processes call it.
    """
    chosen = [dataclasses.replace(sample, **UNLOGGED) for sample in samples if sample.place < count]
    return sorted(move_samples(chosen, [0] * len(chosen)), key=lambda sample: sample.place)


def as_record(sample: Sample) -> Record:
    """Its arrays that say something, and all else in the head."""
    arrays = {name: getattr(sample, name) for name in ARRAYS}
    lists = [sample.student_top_k, *(sample.teacher_top_k or (None, None))]
    arrays |= {name: None if part is None else part.numpy() for name, part in zip(LISTS, lists, strict=True)}
    known = {
        name: array
        for name, array in arrays.items()
        if array is not None and (len(array) or name in {*LISTS, *OPTIONAL})
    }
    return Record((list(known), [getattr(sample, name) for name in PLAIN]), list(known.values()))


def as_sample(record: Record) -> Sample:
    known, values = record.head
    arrays: dict[str, Any] = {"ids": (), "loss_mask": ()} | dict(zip(known, record.arrays, strict=True))
    student, ids, logprobs = (torch.from_numpy(arrays.pop(name)) if name in arrays else None for name in LISTS)
    teacher = None if ids is None or logprobs is None else TopK(ids, logprobs)
    plain = dict(zip(PLAIN, values, strict=True))
    return Sample(**arrays, **plain, student_top_k=student, teacher_top_k=teacher)
