"""The student as its own teacher: its base, itself as it is, or weights that follow it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.models.loading import teacher_device
from fastkl.trainer.models.sizes.flops import without_adapter
from fastkl.trainer.notes import note
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.second_weights import SecondWeights
from fastkl.trainer.teachers.teacher import Lists


class SelfTeachers:
    """Makes a run's teachers that are the student. Equal ones share their weights."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._seconds: dict[str, SecondWeights] = {}
        self._reads_student = False

    def make(self, config: DistillConfig, teacher: TeacherConfig, lists: Lists, role: str = "teacher") -> LocalTeacher:
        """One that scores as the student does; `lists`: what it is asked for beside the log-probs of tokens."""
        student, base = self._student, teacher.self == "base"
        device, model, cost = student.device, student.model, student.cost
        if teacher.follows_student:
            second = self._second(teacher)
            device, model = teacher_device(teacher, student.device), second.model
            self._reads_student |= second.shares
        else:
            self._reads_student = True
        return LocalTeacher(
            model,
            student.layout,
            config.batch.max_tokens,
            config.sampling.temperature,
            device,
            top_k=lists.teacher,
            role=role,
            as_teacher=partial(_as_teacher, student, without=base),
            cost=without_adapter(cost) if base else cost,
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While open, they have weights on every process; entered and left by all of them together."""
        with ExitStack() as stack:
            if self._reads_student:
                stack.enter_context(self._student.gathered())
            for second in self._seconds.values():
                stack.enter_context(second.gathered())
            yield

    def _second(self, teacher: TeacherConfig) -> SecondWeights:
        name = f"{teacher.self} {teacher.ema_rate or teacher.sync_every} on {teacher.device}"
        if name not in self._seconds:
            second = SecondWeights(teacher, self._student, teacher_device(teacher, self._student.device))
            self._student.follow(second)
            self._student.also_checkpoint(f"the teacher's weights: {name}", second)
            self._seconds[name] = second
        return self._seconds[name]


@contextmanager
def _as_teacher(student: Student, without: bool) -> Iterator[None]:
    """In the student's precision; `without` its adapter."""
    model: Any = student.model
    with student.accelerator.autocast(), model.disable_adapter() if without else nullcontext():
        yield


def remark_on_self(config: DistillConfig) -> None:
    """Says so where every teacher is the student, and nothing else gives a first gradient."""
    teachers = config.teachers().values()
    if config.has_teacher and not config.learns_otherwise and all(map(_reads_the_same, teachers)):
        note(
            "every teacher is the student itself and reads the same prompts, so that the KL begins at 0 and stays there: "
            "nothing is learned but rounding errors. Give one a teacher.context, or name a reward.grader"
        )


def _reads_the_same(teacher: TeacherConfig) -> bool:
    """A teacher that is the student in all that it reads and, at first, in what it says."""
    return teacher.self is not None and teacher.context == ContextConfig()
