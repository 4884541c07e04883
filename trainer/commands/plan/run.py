"""A run as far as its plan needs it: outlines of its models, the samples of a step, and the processes that share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedModel

from fastkl.trainer.config.teacher import TeacherConfig, as_teacher
from fastkl.trainer.config.training import DistillConfig, RunConfig
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.models.pretrained import outline


class Scorer(NamedTuple):
    """A model that scores samples."""

    role: str  # teacher or reference
    config: TeacherConfig
    model: PreTrainedModel  # of one that is the student, the student's
    data_sets: frozenset[str]  # whose samples it scores

    @property
    def name(self) -> str:
        """How it is called in the table."""
        return f"{self.role} {self.config.path or self.config.self}"

    def read(self, samples: list[Sample]) -> list[Sample]:
        """Its part of a step's samples, as it reads them."""
        own = [sample for sample in samples if sample.dataset in self.data_sets]
        return [sample.for_teacher() for sample in own] if self.role == "teacher" else own


@dataclass(frozen=True)
class Processes:
    """What a run is started on."""

    count: int
    sharded: bool  # by FSDP 2, else DDP
    device: str  # that of the student: cpu, cuda:0, h200

    @property
    def shards(self) -> int:
        """Of how many parts each process has one."""
        return self.count if self.sharded else 1

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    def __str__(self) -> str:
        if self.count == 1:
            return "a process"
        return f"a process of {self.count}, {'FSDP 2' if self.sharded else 'DDP'}"


class Run(NamedTuple):
    """With outlines of its models and the samples of its first step."""

    config: RunConfig
    processes: Processes
    student: PreTrainedModel
    scorers: list[Scorer]  # those that no server holds
    lengths: list[int]  # of the prompts
    samples: list[Sample]  # a distillation's are of full length
    typical: list[Sample]  # as long as they are expected to be


def scorers_of(config: DistillConfig, student: PreTrainedModel) -> Iterator[Scorer]:
    """The teachers and the reference, with outlines of those that are not the student, but for those behind a server."""
    data_sets = {name: entry.teacher.scorer for name, entry in config.data_sets().items() if entry.teacher is not None}
    here = {teacher for teacher in data_sets.values() if config.has_teacher and not teacher.server.url}
    for teacher in sorted(here, key=lambda teacher: teacher.path or str(teacher.self)):
        own = frozenset(name for name, theirs in data_sets.items() if theirs == teacher)
        yield Scorer("teacher", teacher, outline(teacher) if teacher.self is None else student, own)
    if config.loss.extrapolate != 1:
        reference = as_teacher(config.reference)
        model = outline(reference) if reference.self is None else student
        yield Scorer("reference", reference, model, frozenset(data_sets))
