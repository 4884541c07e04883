"""On-policy distillation: the student samples, the teacher scores, the student learns to be less unlike it.

Thinking Machines, "On-Policy Distillation" (2025); Tinker cookbook, recipe `distillation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.config.losses.control import remark
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.config.training import DistillConfig
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.formats.packed import EndToEnd
from fastkl.trainer.data.mixture import DataSet, all_prompts, prompt_lengths, read_data_sets, step_prompts
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.remarks import remark_on_data_sets, remark_on_length
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.step_metrics import as_metrics, mean_staleness, rollout_means
from fastkl.trainer.loop import Source, fit
from fastkl.trainer.models.checks import SHORTER, check_length
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.pretrained import load_tokenizer, positions
from fastkl.trainer.models.sizes.flops import sampling_flops, work
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.models.withheld import withholds_routers
from fastkl.trainer.notes import note
from fastkl.trainer.objectives.advantages import set_reward_advantages
from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.objectives.registry import asked_lists, make_objective, teacher_passes
from fastkl.trainer.objectives.weights.step import TokenWeights
from fastkl.trainer.rollouts.ahead import AheadRollouts
from fastkl.trainer.rollouts.environments import Environment, make_environment
from fastkl.trainer.rollouts.evaluation import (
    Evaluation,
    check_eval_length,
    check_eval_room,
    eval_rows,
    load_evaluations,
)
from fastkl.trainer.rollouts.judge import make_judge
from fastkl.trainer.rollouts.lengths import filter_by_length
from fastkl.trainer.rollouts.multi_turn import MultiTurn, stop_ids
from fastkl.trainer.rollouts.rollout import Judge, Rollouts
from fastkl.trainer.rollouts.samplers.copied import CopySampler
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.samplers.sampler import Sampler
from fastkl.trainer.rollouts.samplers.served import SamplingServer, ServedSampler, connect_sampling
from fastkl.trainer.rollouts.samplers.weights_folder import memory_emptied
from fastkl.trainer.rollouts.single_turn import Responder, SingleTurn
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.identity import Identity, rows_fingerprint, rows_of, weights_fingerprint
from fastkl.trainer.runs.listener import SILENT, Clock, Listener
from fastkl.trainer.runs.report.hub import check_repository
from fastkl.trainer.runs.sharing.shares import share_out
from fastkl.trainer.runs.start import start_run
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.cached import spared_metrics
from fastkl.trainer.teachers.context.prompts import TeacherPrompts
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.open import check_teachers, connect_servers, open_teachers
from fastkl.trainer.teachers.served import ServedTeacher
from fastkl.trainer.teachers.several import RoutedTeacher


class OnPolicy(Source):
    """The student's samples of a step, made ready by the objective."""

    def __init__(
        self,
        config: DistillConfig,
        student: Student,
        objective: Objective,
        teachers: RoutedTeacher[Any] | None,
        push: Callable[[int], None],
        rollouts: Rollouts,
        weights: TokenWeights,
        teacher_prompts: TeacherPrompts,
        vocab_size: int,
    ) -> None:
        self._config, self._student, self._objective, self._teachers = config, student, objective, teachers
        self._push, self._rollouts, self._weights = push, rollouts, weights
        self._teacher_prompts, self._vocab_size = teacher_prompts, vocab_size
        student.also_checkpoint("rollouts", rollouts)

    def samples(self, step: int, clock: Clock) -> tuple[list[Sample], dict[str, float]]:
        if self._config.sampling.server.url:
            with clock("push_weights"), self._student.gathered():
                processes.on_main(lambda: self._push(step))
        with clock("sample"), self._student.gathered():
            written = self._rollouts.samples(step)
            metrics = set_reward_advantages(written, self._config.reward)
            unmasked, told = self._teacher_prompts.give(written)
            metrics |= told
            samples = filter_by_length(unmasked, self._config.sampling)
            flops = sampling_flops(self._student.cost, [s for s in written if not s.given])
            dropped = len(unmasked) - len(samples)
            sums = processes.add({"written": len(written), "dropped": dropped, "flops": flops})
            metrics["flops/sampling"] = sums["flops"]
            if self._config.sampling.filters:
                metrics["completions/dropped_fraction"] = sums["dropped"] / sums["written"]
            samples = share_out(samples, work(self._student.cost, samples), self._config.optim.substeps)
        if self._teacher_prompts.own:
            with clock("align"):
                metrics |= self._teacher_prompts.encode_together(samples)
        metrics |= self._objective.prepare(samples, self._student, clock)
        if self._teachers is not None and step + 1 == self._config.optim.steps:
            processes.raise_together(self._teachers.recheck)  # no later step would find a server that has changed
        metrics |= self._weights.set(samples)
        metrics |= self._teacher_flops(samples)
        with clock("ranks"):
            self._set_ranks([sample for sample in samples if sample.place < self._config.log_samples])
        means = rollout_means(samples)
        if isinstance(self._rollouts, AheadRollouts):
            means |= mean_staleness(samples)
            metrics |= {"staleness/max": max(processes.gather([max((s.staleness for s in samples), default=0)]))}
            metrics |= {"time/rollouts": processes.on_main(self._rollouts.seconds)}
        self._rollouts.carry_over(samples)  # nothing can fail any more: a checkpoint holds the state between two steps
        metrics |= processes.add(spared_metrics(samples))
        return samples, as_metrics(processes.gather([means])) | metrics

    def settle(self, stopping: Callable[[], bool]) -> None:
        self._rollouts.settle(stopping)

    def _teacher_flops(self, samples: list[Sample]) -> dict[str, float]:
        """Of the teachers and the reference, on all processes; nothing of those whose size one of them does not know."""
        own = {} if self._teachers is None else self._teachers.flops(samples)
        parts = processes.gather([own])
        passes = teacher_passes(self._config.loss)
        return {name: passes * sum(part[name] for part in parts) for name in own if all(name in part for part in parts)}

    def _set_ranks(self, samples: list[Sample]) -> None:
        """Where the tokens of this process's samples stand with the student that sampled them and with the teacher.

        And what a teacher with a prompt of its own would say without it.
        """
        teachers = self._teachers
        self._student.rank(samples, self._vocab_size)
        if teachers is not None:
            with teachers.ready():
                processes.raise_together(lambda: teachers.rank(samples, self._vocab_size))
                processes.raise_together(lambda: teachers.score_plain(samples))


def distill(config: DistillConfig, *, listener: Listener = SILENT) -> RunFolder:
    """Runs (or resumes) a distillation.

    Args:
        config: All settings of the run.
        listener: Callbacks: see `Listener`.

    Raises:
        ConfigError: If the run cannot work; before anything expensive.
    """
    accelerator = start_run(config, config.sampling.samples_per_step, "sampling.prompts_per_step")
    processes.on_main(lambda: check_repository(config))
    first = accelerator.is_main_process
    with RunFolder(config) as folder, memory_emptied(Path(config.run)) if first else nullcontext():
        _distill(config, accelerator, folder, listener)
    return folder


class Prepared(NamedTuple):
    """What a distillation reads, checks and asks before it loads a model."""

    tokenizer: PreTrainedTokenizerBase
    environment: Environment | None
    data_sets: list[DataSet]
    evaluations: list[Evaluation]
    judge: Judge | None
    weights: TokenWeights
    teacher_prompts: TeacherPrompts
    served: dict[TeacherConfig, ServedTeacher]
    sampling_server: SamplingServer | None


def prepare(config: DistillConfig) -> Prepared:
    """Reads the data, and checks tokenizers, graders and servers.

    Raises:
        ConfigError: If the run cannot work.
    """
    tokenizer = load_tokenizer(config.student)
    environment = make_environment(config.environment)
    with_given = config.sampling.on_policy_fraction < 1
    data_sets = read_data_sets(config.data_sets(), tokenizer, with_given=with_given)
    prompts = all_prompts(data_sets)
    teacher_prompts = TeacherPrompts(config, data_sets, tokenizer)
    note(f"{len(prompts)} prompts read and encoded")
    remark_on_data_sets(data_sets, config.sampling.prompts_per_step, "sampling.prompts_per_step")
    longest, read = (int(prompt_lengths(sets).max()) for sets in (data_sets, teacher_prompts.data_sets))
    remark_on_length(max(longest, read) + config.sampling.max_new_tokens, config.batch.max_tokens)
    if (control := remark(config.loss.control)) is not None:
        note(f"this run is {control}")
    lists = asked_lists(config.loss)
    judge = make_judge(config.reward, tokenizer, environment, prompts)
    weights = TokenWeights(config.loss)
    evaluations = load_evaluations(config.eval, tokenizer)
    student = {"student": positions(config.student)}
    for data_set in data_sets:
        shorter = SHORTER.format("sampling", data_set.setting)
        check_length(data_set.prompts, config.sampling.max_new_tokens, student, shorter)
    check_eval_length(evaluations, student)
    check_teachers(config, tokenizer, data_sets, teacher_prompts, lists)
    served = connect_servers(config, tokenizer, teacher_prompts, lists)
    rooms = [(int(one.ask.prompts.ids.lengths.max()) + one.ask.max_new_tokens, one.setting) for one in evaluations]
    sampling_server = connect_sampling(config, tokenizer, longest, rooms) if config.sampling.server.url else None
    return Prepared(
        tokenizer, environment, data_sets, evaluations, judge, weights, teacher_prompts, served, sampling_server
    )


def _distill(config: DistillConfig, accelerator: Accelerator, folder: RunFolder, listener: Listener) -> None:
    found = prepare(config)
    tokenizer, environment, data_sets, evaluations, judge, weights, teacher_prompts, served, sampling_server = found
    lists = asked_lists(config.loss)
    student = Student(config, accelerator)
    if withholds_routers(student.model):
        note("the student's config has output_router_logits: the routers' auxiliary loss is left out of a distillation")
    teachers = open_teachers(config, tokenizer, data_sets, teacher_prompts, student, served, lists)
    check_eval_room(evaluations, "student", student.model)
    objective = make_objective(config.loss, config.sampling, teachers)
    ends = end_of_sequence(student.model, tokenizer)
    teacher_prompts.end_with(ends)
    with student.gathered():
        sampler = make_sampler(config, student, [*ends, *stop_ids(environment, tokenizer)], sampling_server)
    read = [*(data_set.prompts for data_set in data_sets), *(one.ask.prompts for one in evaluations)]
    chats = dict.fromkeys(chat for prompts in read for chat in prompts.chats)
    responder = make_responder(config, student.model, tokenizer, sampler, environment, chats)
    rollouts: Rollouts
    parts = _rollout_parts(config, responder, data_sets, judge)
    if isinstance(sampler, ServedSampler) and config.sampling.steps_ahead:
        tell = _early(config, teachers, teacher_prompts)
        rollouts = AheadRollouts(*parts, sampler=sampler, steps=config.optim.steps, tell=tell)
        push, responder = rollouts.ask, rollouts.undisturbed(responder)
    else:
        rollouts, push = Rollouts(*parts), lambda step: sampler.refresh()
    ids = vocabulary(tokenizer)
    source = OnPolicy(config, student, objective, teachers, push, rollouts, weights, teacher_prompts, ids)
    student.also_checkpoint("objective", objective)
    student.also_checkpoint("identity", _identity(student, teachers, data_sets, teacher_prompts, evaluations))
    for name, teacher in ({} if teachers is None else teachers.by_data_set).items():
        if isinstance(teacher, ServedTeacher):
            student.also_checkpoint(f"teacher's server {name}", teacher)
    with closing(rollouts), nullcontext() if teachers is None else closing(teachers):
        own = {name: each.reader.tokenizer for name, each in teacher_prompts.own.items()}
        fit(student, objective, source, responder, tokenizer, evaluations, folder, listener, own)
    if (control := remark(config.loss.control)) is not None:
        note(f"this run was {control}")


def _identity(
    student: Student,
    teachers: RoutedTeacher[Any] | None,
    data_sets: list[DataSet],
    teacher_prompts: TeacherPrompts,
    evaluations: list[Evaluation],
) -> Identity:
    """The rows of each data set and what teachers read, the student's weights, and those of teachers loaded here."""
    prints = {
        f"what the teacher of {read.setting} reads": rows_fingerprint(read.prompts)
        for data_set, read in zip(data_sets, teacher_prompts.data_sets, strict=True)
        if read is not data_set
    }
    prints |= rows_of(data_sets, eval_rows(evaluations)) | {"the student's weights": student.fingerprint}
    own = {data_set.name for data_set in data_sets if data_set.teacher.self is not None}
    for name, teacher in ({} if teachers is None else teachers.by_data_set).items():
        if isinstance(teacher, LocalTeacher) and name not in own:
            prints[f"the weights of the teacher{name and f' of {name}'}"] = weights_fingerprint(teacher.model)
    reference = None if teachers is None else teachers.reference
    if reference is not None and reference.model is not student.model:
        prints["the weights of the reference"] = weights_fingerprint(reference.model)
    return Identity(prints)


def _rollout_parts(
    config: DistillConfig, responder: Responder, data_sets: list[DataSet], judge: Judge | None
) -> tuple[Any, ...]:
    """The arguments of `Rollouts`."""

    def prompts_of(step: int) -> list[EncodedPrompt]:
        return step_prompts(data_sets, config.sampling.prompts_per_step, step, config.seed)

    given = EndToEnd([data_set.given for data_set in data_sets if data_set.given is not None])
    return config.sampling, responder, prompts_of, config.seed, all_prompts(data_sets), given, judge


def _early(
    config: DistillConfig, teachers: RoutedTeacher[Any] | None, prompts: TeacherPrompts
) -> Callable[[Sample], None]:
    """Has a teacher that is a server begin with a sample. Of several processes each asks about its own, later."""

    def tell(sample: Sample) -> None:
        known = processes.count() == 1 and not prompts.depends_on_samples(sample.dataset)
        if teachers is not None and known and filter_by_length([sample], config.sampling):
            prompts.give_fixed([sample])
            prompts.encode([sample])
            teachers.ask_early(sample)

    return tell


def make_responder(
    config: DistillConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    environment: Environment | None,
    chats: Iterable[ChatTemplate | None],
) -> Responder:
    """What answers prompts by a sampler of a model: in one turn, or as the environment has it."""
    ends, context = end_of_sequence(model, tokenizer), context_length(model)
    if environment is None:
        return SingleTurn(sampler, context)
    if config.sampling.steps_ahead:  # in a thread of their own; nobody says that a tokenizer may be in two at a time
        tokenizer = copy.deepcopy(tokenizer)
    return MultiTurn(sampler, tokenizer, environment, config.environment, ends, context, chats)


def make_sampler(config: DistillConfig, student: Student, ends: list[int], server: SamplingServer | None) -> Sampler:
    """Samples from the student: here, or on its server. `ends` are the ids that end a completion."""
    if server is not None:
        return ServedSampler(server, student, ends)
    make = partial(local_sampler, eos_token_ids=ends, settings=config.sampling)
    dtype = config.sampling.dtype
    return make(student.model) if dtype is None else CopySampler(student, getattr(torch, dtype), make)
