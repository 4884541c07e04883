"""The teachers of a run: each connected or loaded once, and checked with the data sets it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastkl.head import FusedCausalLM
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.mixture import DataSet
from fastkl.trainer.models import checks
from fastkl.trainer.models.loading import fuse, load_teacher, load_teacher_tokenizer, teacher_device
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Teacher


def check_teachers(config: DistillConfig, tokenizer: PreTrainedTokenizerBase, data_sets: Sequence[DataSet]) -> None:
    """Tokenizers, chat templates and devices, before any model is loaded."""
    if config.loss.objective == "top_k":
        checks.check_top_k(config.loss.top_k, tokenizer)
    for data_set in data_sets if config.has_teacher else ():
        teacher_device(data_set.teacher, torch.device("cpu"))
        theirs = load_teacher_tokenizer(data_set.teacher)
        if theirs is not None:
            checks.check_tokenizers(tokenizer, theirs)
            checks.check_chat(tokenizer, theirs, data_set.prompts, data_set.config.data.chat_template)


def connect_servers(
    config: DistillConfig, tokenizer: PreTrainedTokenizerBase, data_sets: Sequence[DataSet]
) -> dict[TeacherConfig, ServedTeacher]:
    """The teachers behind HTTP; a server has been checked by asking it."""
    served = {}
    for data_set in data_sets:
        if data_set.teacher.server.url and data_set.teacher not in served:
            own = [other for other in data_sets if other.teacher == data_set.teacher]
            new = [PAD_ID] * config.sampling.max_new_tokens
            samples = [(prompt.ids + new, other) for other in own for prompt in other.prompts]
            samples += [(sample.ids, other) for other in own for sample in other.given]
            longest, where = max(samples, key=lambda pair: len(pair[0]))
            served[data_set.teacher] = connect(
                data_set.teacher,
                tokenizer,
                temperature=config.sampling.temperature,
                longest=longest,
                remedy=checks.SHORTER.format("sampling", where.setting),
                top_k=_top_k(config),
            )
    return served


def open_teachers(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: Sequence[DataSet],
    student: Student,
    served: dict[TeacherConfig, ServedTeacher],
) -> RoutedTeacher[Any]:
    """Those behind HTTP and those that are loaded here; models are checked against the student and the data."""
    teachers: dict[TeacherConfig, Teacher] = {**served}
    for data_set in data_sets:
        if config.has_teacher and data_set.teacher not in teachers:
            teachers[data_set.teacher] = _load(config, data_set.teacher, tokenizer, student)
        teacher = teachers.get(data_set.teacher)
        local = teacher.model if isinstance(teacher, LocalTeacher) else None
        whose = f"teacher of {data_set.name}" if data_set.name else "teacher"
        models = {"student": student.model} | ({} if local is None else {whose: local})
        checks.check_vocabulary(tokenizer, models)
        checks.check_end_of_sequence(student.model, local, tokenizer)
        remedy = checks.SHORTER.format("sampling", data_set.setting)
        checks.check_room(data_set.prompts, config.sampling.max_new_tokens, models, remedy)
        if data_set.given:
            lengths = [sample.loss_tokens for sample in data_set.given]
            checks.check_room(data_set.prompts, lengths, models, checks.SHORTER_ROW)
    return RoutedTeacher({s.name: teachers[s.teacher] for s in data_sets if s.teacher in teachers})


def _load(
    config: DistillConfig, teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase, student: Student
) -> LocalTeacher:
    if teacher.base_of_student:
        fused, device = _base_of(student), student.device
        options: dict[str, Any] = {"as_teacher": partial(_without_adapter, student)}
    else:
        options, device = {}, teacher_device(teacher, student.device)
        fused = fuse(load_teacher(teacher, device), "teacher")
        models: list[Any] = [student.model, fused.model]
        ours, theirs = (model.get_output_embeddings().weight.shape[0] for model in models)
        options["vocab_size"] = None if ours == theirs else vocabulary(tokenizer)
    return LocalTeacher(fused, config.batch, config.sampling.temperature, device, top_k=_top_k(config), **options)


def _base_of(student: Student) -> FusedCausalLM:
    """The student itself; where it is sharded, its whole copy, which from now on has weights while a teacher is needed."""
    if not student.sharded:
        plain: FusedCausalLM = student.plain
        return plain
    student.with_teacher = student.gathered
    with student.gathered():
        return fuse(student.model, "teacher")


@contextmanager
def _without_adapter(student: Student) -> Iterator[None]:
    model: Any = student.model
    with student.accelerator.autocast(), model.disable_adapter():
        yield


def _top_k(config: DistillConfig) -> int | None:
    return config.loss.top_k if config.loss.objective == "top_k" else None
