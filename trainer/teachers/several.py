"""Several teachers as one: each scores the samples of its data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Generic, TypeVar

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.alignment.common import CommonVocabulary
from fastkl.trainer.teachers.cached import CachedTeacher
from fastkl.trainer.teachers.lists import packed
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher
from fastkl.trainer.teachers.teacher import Teacher

T = TypeVar("T", bound=Teacher, covariant=True)


class RoutedTeacher(Generic[T]):
    """Teachers by the name of a data set; some may be one and the same object (see `Teacher`).

    Args:
        ready: A context in which they can be used; entered and left by all processes together.
        reference: Scores all samples too, into a list of its own.
        caches: What is asked in the place of a teacher, by the name of a data set.
        vocabularies: How many ids a teacher's own tokenizer has, by the name of a data set.
        common: The tokens that it has in common with the student's, where distributions are compared.
    """

    def __init__(
        self,
        teachers: Mapping[str, T],
        ready: Callable[[], AbstractContextManager[None]] = nullcontext,
        reference: LocalTeacher | None = None,
        caches: Mapping[str, CachedTeacher] = MappingProxyType({}),
        vocabularies: Mapping[str, int] = MappingProxyType({}),
        common: Mapping[str, CommonVocabulary] = MappingProxyType({}),
    ) -> None:
        self.by_data_set, self.ready, self.reference = teachers, ready, reference
        self._caches, self._vocabularies, self._common = caches, vocabularies, common

    def score(self, samples: Sequence[Sample]) -> None:
        for group in self.groups(samples):
            with as_read(group) as read:
                self._asked(group).score(read)
            for sample, scored in zip(group, read, strict=True):
                if (common := self.common(group)) is not None and scored.teacher_top_k is not None:
                    sample.teacher_top_k = packed(common.listed(sample, scored.teacher_top_k))
        if self.reference is not None:
            self.reference.score(samples)

    def ask_early(self, sample: Sample) -> None:
        """Has the sample's teacher begin with it, if that is a server without a cache; by any thread."""
        teacher: Teacher = self.by_data_set[sample.dataset]
        if isinstance(teacher, ServedTeacher) and sample.dataset not in self._caches:
            teacher.ask_early(sample.for_teacher())

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        """See `Teacher.rank`; among the ids of its own tokenizer, where a teacher has one."""
        for group in self.groups(samples):
            with as_read(group) as read:
                self._asked(group).rank(read, self._vocabularies.get(group[0].dataset, vocab_size))

    def score_plain(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.score_plain`, of the samples whose teacher has a prompt of its own, and the student's tokenizer."""
        told = [s for s in samples if s.teacher_prompt is not None and s.teacher_completion is None]
        for group in self.groups(told):
            self._asked(group).score_plain(group)

    def close(self) -> None:
        """The run is over: nobody will ask for what was asked early."""
        for teacher in self.by_data_set.values():
            if isinstance(teacher, ServedTeacher):
                teacher.close()

    def recheck(self) -> None:
        for teacher in {id(teacher): teacher for teacher in self.by_data_set.values()}.values():
            teacher.recheck()

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`flops/teacher` of what was computed, and the reference's; see `Teacher.flops`."""
        read = [sample.for_teacher() for sample in samples]
        parts = [self.of(group).flops([s for s in group if not s.teacher_cached]) for group in self.groups(read)]
        known = [part["flops/teacher"] for part in parts if part]
        total = {"flops/teacher": sum(known)} if len(known) == len(parts) else {}
        if self.reference is not None:
            total |= self.reference.flops(samples)
        return total

    def groups(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The samples apart by teacher, and by what it has in common with the student, in their order."""
        found: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            name = sample.dataset
            found.setdefault((id(self.by_data_set[name]), id(self._common.get(name))), []).append(sample)
        return list(found.values())

    def of(self, group: Sequence[Sample]) -> T:
        """The teacher of a group."""
        return self.by_data_set[group[0].dataset]

    def common(self, group: Sequence[Sample]) -> CommonVocabulary | None:
        """What the teacher of a group has in common with the student; None: each id is the same token for both."""
        return self._common.get(group[0].dataset)

    def known_ids(self, group: Sequence[Sample]) -> int | None:
        """The ids from this one on are left out of distributions that a group's teacher is compared with; None: none."""
        return None if self.common(group) is not None else self.of(group).vocab_size

    def _asked(self, group: Sequence[Sample]) -> T | CachedTeacher:
        return self._caches.get(group[0].dataset) or self.of(group)


@contextmanager
def as_read(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The samples as their teacher reads them; what it writes into those is taken over."""
    read = [sample.for_teacher() for sample in samples]
    yield read
    for sample, scored in zip(samples, read, strict=True):
        if scored is not sample:
            sample.take_scores(scored)
