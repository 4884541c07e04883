"""What a probe loads and asks: the parts of a run, without its folder, its sampling server and its caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

from fastkl.trainer.config.mixture import TaughtConfig
from fastkl.trainer.config.offline import ProbeConfig
from fastkl.trainer.config.sampling import SamplingServerConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.mixture import DataSet, all_prompts
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.distill import Prepared, make_responder, make_sampler, prepare
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.notes import note
from fastkl.trainer.objectives.registry import asked_lists
from fastkl.trainer.rollouts.multi_turn import stop_ids
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.runs import processes
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.open import open_teachers
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists


class Opened(NamedTuple):
    """Student and teachers of a run that does not begin."""

    config: ProbeConfig  # as the probe has it
    prepared: Prepared
    student: Student
    teachers: RoutedTeacher[Any]
    ends: list[int]  # ids that end a completion
    responder: Responder  # of the student
    prompts: Sequence[EncodedPrompt]  # of all data, by their index, as the student reads them


@contextmanager
def opened(config: ProbeConfig) -> Iterator[Opened]:
    """Checks and loads all that the run would, in a group of one process."""
    if config.sampling.server.url:
        note("the probe samples here, not on sampling.server")
    settings = for_probe(config)
    accelerator = processes.start(settings)
    prepared = prepare(settings)
    tokenizer, prompts = prepared.tokenizer, all_prompts(prepared.data_sets)
    # A server gives what it gives in the run; a model here is asked for its likeliest tokens too.
    lists = asked_lists(settings.loss) if prepared.served else _likeliest(config, prepared)
    student = Student(settings, accelerator)
    teachers = open_teachers(
        settings, tokenizer, prepared.data_sets, prepared.teacher_prompts, student, prepared.served, lists
    )
    assert teachers is not None  # ProbeConfig demands one
    ends = [*end_of_sequence(student.model, tokenizer), *stop_ids(prepared.environment, tokenizer)]
    prepared.teacher_prompts.end_with(ends)
    chats = chats_of(prepared.data_sets)
    sampler = make_sampler(settings, student, ends, None)
    responder = make_responder(settings, student.model, tokenizer, sampler, prepared.environment, chats)
    with closing(teachers):
        yield Opened(settings, prepared, student, teachers, ends, responder, prompts)


def chats_of(data_sets: Iterable[DataSet]) -> list[ChatTemplate | None]:
    """What wrote their prompts."""
    return list(dict.fromkeys(chat for data_set in data_sets for chat in data_set.prompts.chats))


def _likeliest(config: ProbeConfig, prepared: Prepared) -> Lists:
    """Of tokens that the student does not have, nothing is to be compared."""
    return Lists() if prepared.teacher_prompts.own else Lists(teacher=min(config.top, vocabulary(prepared.tokenizer)))


def for_probe(config: ProbeConfig) -> ProbeConfig:
    """The settings of a run whose student writes every completion here, at once and of full length."""
    sampling = dataclasses.replace(
        config.sampling,
        server=SamplingServerConfig(),
        steps_ahead=0,
        on_policy_fraction=1.0,
        given_coef=1.0,
        tokens_per_step=None,
        initial_new_tokens=None,
        growth_steps=0,
    )
    mixture = {name: _uncached_entry(entry) for name, entry in config.mixture.items()}
    return dataclasses.replace(config, sampling=sampling, teacher=_uncached(config.teacher), mixture=mixture)


def _uncached_entry(entry: TaughtConfig) -> TaughtConfig:
    return entry if entry.teacher is None else dataclasses.replace(entry, teacher=_uncached(entry.teacher))


def _uncached(teacher: TeacherConfig) -> TeacherConfig:
    return dataclasses.replace(teacher, cache=None, cache_gigabytes=TeacherConfig.cache_gigabytes)
