"""What student and teacher write after the same prompts, greedily and sampled, and how it is graded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fastkl.trainer.commands.probe.opened import Opened
from fastkl.trainer.data.mixture import step_prompts
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.distill import make_responder
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.notes import note
from fastkl.trainer.rollouts.grading.named import named_grader
from fastkl.trainer.rollouts.judge import by_text
from fastkl.trainer.rollouts.rollout import Judge, Rollouts
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.samplers.remote import RemoteSampler
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.generation import GenerationServer
from fastkl.trainer.teachers.local import LocalTeacher

GREEDY, SAMPLED = "greedy", "sampled"


class Score(NamedTuple):
    """Of one answer."""

    prompt: int  # its index in the data
    value: float


Scores = dict[str, list[Score]]  # by how the answers were written


class Written(NamedTuple):
    """The student's samples, with what the teacher says of them, and the scores of both."""

    samples: list[Sample]
    student: Scores
    teacher: Scores
    missing: list[str]  # why something is missing, in words


def write(found: Opened) -> Written:
    """Has the student write, the teacher score it, and both answer the same prompts."""
    config = found.config
    count = min(config.prompts, len(found.prompts))
    prompts = step_prompts(found.prepared.data_sets, count, 0, config.seed)
    judge, missing = _judge(found)
    note(f"the student answers {count} prompts")
    rollouts = Rollouts(config.sampling, found.responder, lambda _: prompts, config.seed, found.prompts, [], judge)
    with found.student.gathered():
        samples = rollouts.samples(0)
    found.prepared.teacher_prompts.give(samples)
    note(f"the teacher scores {len(samples)} answers")
    with found.teachers.ready():
        found.teachers.score(samples)
    if judge is None:
        return Written(samples, {}, {}, missing)
    student = _answered(found, found.responder, prompts, judge, (GREEDY,))
    student[SAMPLED] = [Score(sample.prompt_index, sample.reward or 0.0) for sample in samples]
    teacher: Scores = {}
    try:
        teacher = _of_teachers(found, _as_read(samples, prompts), judge)
    except ServerError as error:
        missing.append(f"the teacher's answers are not there: {error}")
    return Written(samples, student, teacher, missing)


def _judge(found: Opened) -> tuple[Judge | None, list[str]]:
    """What grades rewards, or evaluations where all rows have what it reads; or why nothing does."""
    if found.prepared.judge is not None:
        return found.prepared.judge, []
    settings = found.config.eval
    grader = named_grader("eval.grader", settings.grader, trusted=settings.trust_grader)
    try:
        grader.check_rows(found.prompts, "accuracy")
    except ConfigError as error:
        return None, [f"nothing is graded: {error}"]
    return by_text(grader, found.prepared.tokenizer), []


def _answered(
    found: Opened, responder: Responder, prompts: Sequence[EncodedPrompt], judge: Judge, ways: Sequence[str]
) -> Scores:
    """One answer to each prompt, in each of the ways."""
    sampling, scores = found.config.sampling, {}
    for way in ways:
        written = responder.respond(
            prompts,
            max_new_tokens=[sampling.max_new_tokens] * len(prompts),
            temperature=0.0 if way == GREEDY else sampling.temperature,
            seed=found.config.seed,
        )
        scores[way] = [Score(p.index, judge(trajectory, p)) for p, trajectory in zip(prompts, written, strict=True)]
    return scores


def _as_read(samples: Sequence[Sample], prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The prompts as their teachers read them."""
    own = {sample.prompt_index: sample.teacher_prompt for sample in samples if sample.teacher_prompt is not None}
    return [
        dataclasses.replace(prompt, tokens=own[prompt.index].tolist()) if prompt.index in own else prompt
        for prompt in prompts
    ]


def _of_teachers(found: Opened, prompts: Sequence[EncodedPrompt], judge: Judge) -> Scores:
    """Each teacher answers the prompts of its data sets."""
    scores: Scores = {GREEDY: [], SAMPLED: []}
    teachers = found.teachers.by_data_set
    for teacher in {id(teachers[prompt.dataset]): teachers[prompt.dataset] for prompt in prompts}.values():
        own = [prompt for prompt in prompts if teachers[prompt.dataset] is teacher]
        note(f"the teacher answers {len(own)} prompts")
        with _responder(found, own[0].dataset) as responder:
            for way, values in _answered(found, responder, own, judge, (GREEDY, SAMPLED)).items():
                scores[way] += values
    return scores


@contextmanager
def _responder(found: Opened, data_set: str) -> Iterator[Responder]:
    """What answers as the teacher of a data set."""
    teacher, config, prepared = found.teachers.by_data_set[data_set], found.config, found.prepared
    if isinstance(teacher, LocalTeacher):
        with found.teachers.ready(), teacher.writing() as model:
            sampler = local_sampler(model, eos_token_ids=found.ends, settings=config.sampling)
            yield make_responder(config, model, prepared.tokenizer, sampler, prepared.environment, found.chats)
        return
    server = config.data_sets()[data_set].teacher.server  # type: ignore[union-attr]
    asked = GenerationServer(Connection(server, "the teacher's server"), vocabulary(prepared.tokenizer))
    sampler = RemoteSampler(asked, server.model, found.ends, server.concurrency, "fastkl probe")
    yield make_responder(config, found.student.model, prepared.tokenizer, sampler, prepared.environment, found.chats)
