"""The teachers of a run: each connected or loaded once, and checked with the data sets it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.teacher import TeacherConfig, as_teacher
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.mixture import DataSet, all_prompts, sampled_lengths
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.models import checks
from fastkl.trainer.models.loading import fuse, load_teacher, load_teacher_tokenizer, teacher_device
from fastkl.trainer.models.pretrained import positions
from fastkl.trainer.models.self_checks.layouts import batch_layout
from fastkl.trainer.models.self_checks.probe import Probe
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.alignment.common import CommonVocabulary
from fastkl.trainer.teachers.cached import Cacheable, CachedTeacher, cached
from fastkl.trainer.teachers.context.prompts import TeacherPrompts
from fastkl.trainer.teachers.itself import SelfTeachers, remark_on_self
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import ServedTeacher, connect
from fastkl.trainer.teachers.several import RoutedTeacher
from fastkl.trainer.teachers.teacher import Lists


def check_teachers(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: Sequence[DataSet],
    prompts: TeacherPrompts,
    lists: Lists,
) -> None:
    """Tokenizers, chat templates, lengths and devices, before any model is loaded. `prompts`: what teachers read."""
    readers = [prompts.reader(data_set.name).tokenizer for data_set in data_sets]
    for count, those in ((lists.teacher, readers), (lists.student, [tokenizer])):
        for each in {id(each): each for each in those}.values():
            if count is not None:
                checks.check_top_k(count, each, lists.setting)
    remark_on_self(config)
    for data_set in prompts.data_sets if config.has_teacher else ():
        _check_scorer(data_set.teacher, tokenizer, data_set.prompts, "teacher")
        if not data_set.teacher.server.url:
            limits = {whose(data_set): positions(data_set.teacher if data_set.teacher.self is None else config.student)}
            checks.check_length(data_set.prompts, config.sampling.max_new_tokens, limits, remedy(config, data_set))
    if config.loss.extrapolate != 1:
        _check_scorer(as_teacher(config.reference), tokenizer, all_prompts(data_sets), "reference")


def _check_scorer(
    config: TeacherConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[EncodedPrompt], name: str
) -> None:
    teacher_device(config, torch.device("cpu"), name)
    theirs = None if config.own_tokenizer else load_teacher_tokenizer(config)
    if theirs is not None:
        checks.check_tokenizers(tokenizer, theirs, name)
        checks.check_chat(tokenizer, theirs, prompts, name)


def connect_servers(
    config: DistillConfig, tokenizer: PreTrainedTokenizerBase, prompts: TeacherPrompts, lists: Lists
) -> dict[TeacherConfig, ServedTeacher]:
    """The teachers behind HTTP; a server has been checked by asking it."""
    served, read = dict[TeacherConfig, ServedTeacher](), prompts.data_sets
    for data_set in read:
        if data_set.teacher.server.url and data_set.teacher not in served:
            own = [other for other in read if other.teacher == data_set.teacher]
            new = [PAD_ID] * config.sampling.max_new_tokens
            sequences = [(other.prompts.ids.longest() + new, other) for other in own]
            sequences += [
                ([PAD_ID] * other.context.max_tokens + new, other) for other in own if other.context.max_tokens
            ]
            sequences += [(other.given.longest(), other) for other in own if other.given is not None]
            longest, where = max(sequences, key=lambda pair: len(pair[0]))
            served[data_set.teacher] = connect(
                data_set.teacher,
                prompts.reader(data_set.name).tokenizer,
                temperature=config.sampling.temperature,
                longest=longest,
                remedy=remedy(config, where),
                top_k=lists.teacher,
                top_k_setting=lists.setting,
                listed=lists.student,
            )
    return served


def open_teachers(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: Sequence[DataSet],
    prompts: TeacherPrompts,
    student: Student,
    served: dict[TeacherConfig, ServedTeacher],
    lists: Lists,
) -> RoutedTeacher[Any] | None:
    """Those behind HTTP and those that are loaded here; models are checked against the student and the data.

    None where the run has no teacher. `prompts` are what they read, and learn how long they may be. `lists` is what each is
    asked for beside the log-probs of tokens.
    """
    teachers: dict[TeacherConfig, Cacheable] = {**served}
    itself = SelfTeachers(student)
    new = config.sampling.max_new_tokens
    checks.check_one_rope(sampled_lengths(data_sets), new, {"student": student.model})
    for data_set, own in zip(data_sets, prompts.data_sets, strict=True):
        if config.has_teacher and data_set.teacher not in teachers:
            teachers[data_set.teacher] = _open(config, data_set.teacher, tokenizer, student, itself, lists)
        teacher = teachers.get(data_set.teacher)
        local = teacher.model if isinstance(teacher, LocalTeacher) else None
        models = {} if local is None else {whose(data_set): local}
        reader = prompts.reader(data_set.name)
        checks.check_vocabulary(tokenizer, {"student": student.model})
        checks.check_vocabulary(reader.tokenizer, models)
        checks.check_end_of_sequence(student.model, None if reader.own else local, tokenizer)
        check_fit(config, data_set, {"student": student.model}, checks.SHORTER.format("sampling", data_set.setting))
        check_fit(config, own, models, remedy(config, own))
        if local is not None:
            prompts.limit(own, local)
        elif isinstance(teacher, ServedTeacher):
            prompts.limit_served(own, teacher.longest)
    if not teachers:
        return None
    by_data_set = {data_set.name: teachers[data_set.teacher] for data_set in data_sets}
    reference = _reference(config, tokenizer, data_sets, student, itself)
    caches = _caches(config, data_sets, teachers, lists)
    vocabularies = {name: vocabulary(own.reader.tokenizer) for name, own in prompts.own.items()}
    common = _within_heads(prompts.common, student, by_data_set)
    return RoutedTeacher(by_data_set, itself.ready, reference, caches, vocabularies, common)


def _within_heads(
    common: Mapping[str, CommonVocabulary], student: Student, teachers: Mapping[str, Cacheable]
) -> dict[str, CommonVocabulary]:
    """By data set, without ids that a head lacks; equal ones are one object."""
    found: dict[tuple[int, int], CommonVocabulary] = {}
    for name, own in common.items():
        teacher = teachers[name]
        models: list[Any] = [student.model, teacher.model if isinstance(teacher, LocalTeacher) else None]
        rows = (None if each is None else len(each.get_output_embeddings().weight) for each in models)
        if (id(own), id(teacher)) not in found:
            found[id(own), id(teacher)] = own.within(*rows)
    return {name: found[id(own), id(teachers[name])] for name, own in common.items()}


def _caches(
    config: DistillConfig, data_sets: Sequence[DataSet], teachers: Mapping[TeacherConfig, Cacheable], lists: Lists
) -> dict[str, CachedTeacher]:
    """By the names of the data sets whose teachers have one."""
    temperature = config.sampling.temperature
    found: dict[str, CachedTeacher] = {}
    for settings, teacher in teachers.items():
        precision = "no" if settings.self is None else config.mixed_precision
        cache = cached(settings, teacher, lists, temperature, precision)
        if cache is not None:
            found |= {data_set.name: cache for data_set in data_sets if data_set.teacher == settings}
    return found


def _reference(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    data_sets: Sequence[DataSet],
    student: Student,
    itself: SelfTeachers,
) -> LocalTeacher | None:
    """The model of `reference`, which reads what the student reads; None where the loss asks for none."""
    if config.loss.extrapolate == 1:
        return None
    reference = _open(config, as_teacher(config.reference), tokenizer, student, itself, Lists(), "reference")
    models = {"reference": reference.model}
    checks.check_vocabulary(tokenizer, models)
    checks.check_end_of_sequence(student.model, reference.model, tokenizer, "reference")
    for data_set in data_sets:
        check_fit(config, data_set, models, checks.SHORTER.format("sampling", data_set.setting))
    return reference


def whose(data_set: DataSet) -> str:
    """What messages call the teacher of a data set."""
    return f"teacher of {data_set.name}" if data_set.name else "teacher"


def check_fit(config: DistillConfig, data_set: DataSet, models: dict[str, PreTrainedModel], shorter: str) -> None:
    """Prompts and completions fit the models' contexts, and no model computes otherwise while they grow.

    `shorter` is what to do where they do not fit.
    """
    new = config.sampling.max_new_tokens
    checks.check_room(data_set.prompts, new, models, shorter)
    if data_set.given is not None:
        checks.check_given(data_set.given, models)
    else:
        checks.check_one_rope(data_set.prompts.ids.lengths, new, models)


def remedy(config: DistillConfig, data_set: DataSet) -> str:
    """What to do where the teacher's prompts and full completions are too long."""
    if data_set.context == ContextConfig():
        return checks.SHORTER.format("sampling", data_set.setting)
    return checks.SHORTER_CONTEXT.format("sampling", f"{config.teacher_setting(data_set.name)}.context")


def _open(
    config: DistillConfig,
    teacher: TeacherConfig,
    tokenizer: PreTrainedTokenizerBase,
    student: Student,
    itself: SelfTeachers,
    lists: Lists,
    role: str = "teacher",
) -> LocalTeacher:
    if teacher.self is not None:
        return itself.make(config, teacher, lists, role)
    device = teacher_device(teacher, student.device, role)
    model = fuse(load_teacher(teacher, device, role), role)
    layout = batch_layout(config.batch, model, Probe(model, role))
    models: list[Any] = [student.model, model]
    ours, theirs = (each.get_output_embeddings().weight.shape[0] for each in models)
    cut = None if ours == theirs or teacher.own_tokenizer else min(ours, theirs, vocabulary(tokenizer))
    tokens, temperature = config.batch.max_tokens, config.sampling.temperature
    options: dict[str, Any] = {"top_k": lists.teacher, "vocab_size": cut, "shared_only": lists.with_token, "role": role}
    return LocalTeacher(model, layout, tokens, temperature, device, **options)
