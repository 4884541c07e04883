"""What student and teacher write after the same prompts, greedily and sampled, and how it is graded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.commands.probe.opened import Opened, chats_of
from fastkl.trainer.data.mixture import step_prompts
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.distill import make_responder
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.models.ends import end_of_sequence, tokenizer_ends
from fastkl.trainer.models.tokenizers import vocabulary
from fastkl.trainer.notes import note
from fastkl.trainer.rollouts.grading.named import named_grader
from fastkl.trainer.rollouts.judge import by_text, make_judge
from fastkl.trainer.rollouts.rollout import Judge, Rollouts
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.samplers.remote import RemoteSampler
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.generation import GenerationServer
from fastkl.trainer.teachers.alignment.counts import Counts
from fastkl.trainer.teachers.alignment.reader import Reader
from fastkl.trainer.teachers.local import LocalTeacher

GREEDY, SAMPLED = "greedy", "sampled"
NO_TOKENS_IN_COMMON = (
    "the likeliest tokens are not compared: a teacher.tokenizer is own, and its tokens are not the student's"
)


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
    aligned: Counts  # of teachers with their own tokenizers


def write(found: Opened) -> Written:
    """Has the student write, the teacher score it, and both answer the same prompts."""
    config = found.config
    count = min(config.prompts, len(found.prompts))
    prompts = step_prompts(found.prepared.data_sets, count, 0, config.seed)
    tokenizer = found.prepared.tokenizer
    judge, missing = _judge(found, tokenizer)
    if found.prepared.teacher_prompts.own:
        missing.append(NO_TOKENS_IN_COMMON)
    note(f"the student answers {count} prompts")
    rollouts = Rollouts(config.sampling, found.responder, lambda _: prompts, config.seed, found.prompts, [], judge)
    with found.student.gathered():
        samples = rollouts.samples(0)
    found.prepared.teacher_prompts.give(samples)
    aligned = found.prepared.teacher_prompts.encode(samples)
    note(f"the teacher scores {len(samples)} answers")
    with found.teachers.ready():
        found.teachers.score(samples)
    if judge is None:
        return Written(samples, {}, {}, missing, aligned)
    student = _answered(found, found.responder, prompts, judge, (GREEDY,))
    student[SAMPLED] = [Score(sample.prompt_index, sample.reward or 0.0) for sample in samples]
    teacher: Scores = {}
    try:
        teacher = _of_teachers(found, _as_read(samples, prompts), aligned)
    except ServerError as error:
        missing.append(f"the teacher's answers are not there: {error}")
    return Written(samples, student, teacher, missing, aligned)


def _judge(found: Opened, tokenizer: PreTrainedTokenizerBase) -> tuple[Judge | None, list[str]]:
    """What grades rewards, or evaluations where all rows have what it reads; or why nothing does.

    What is graded was written in this tokenizer.
    """
    rewarding = make_judge(found.config.reward, tokenizer, found.prepared.environment, found.prompts)
    if rewarding is not None:
        return rewarding, []
    settings = found.config.eval
    grader = named_grader("eval.grader", settings.grader, trusted=settings.trust_grader)
    try:
        grader.check_rows(found.prompts, "accuracy")
    except ConfigError as error:
        return None, [f"nothing is graded: {error}"]
    return by_text(grader, tokenizer), []


def _answered(
    found: Opened,
    responder: Responder,
    prompts: Sequence[EncodedPrompt],
    judge: Judge,
    ways: Sequence[str],
    longer: float = 1.0,
) -> Scores:
    """One answer to each prompt, in each of the ways, of at most `longer` times as many tokens as the student's."""
    sampling, scores = found.config.sampling, {}
    most = math.ceil(longer * sampling.max_new_tokens)
    for way in ways:
        written = responder.respond(
            prompts,
            max_new_tokens=[most] * len(prompts),
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


def _of_teachers(found: Opened, prompts: Sequence[EncodedPrompt], aligned: Counts) -> Scores:
    """Each teacher answers the prompts of its data sets; one with its own tokenizer in as much text as the student."""
    scores: Scores = {GREEDY: [], SAMPLED: []}
    teachers = found.teachers.by_data_set
    for teacher in {id(teachers[prompt.dataset]): teachers[prompt.dataset] for prompt in prompts}.values():
        own = [prompt for prompt in prompts if teachers[prompt.dataset] is teacher]
        note(f"the teacher answers {len(own)} prompts")
        reader = found.prepared.teacher_prompts.reader(own[0].dataset)
        judge, _ = _judge(found, reader.tokenizer)
        assert judge is not None  # the student's answers have one
        longer = max(1.0, aligned.growth) if reader.own else 1.0
        with _responder(found, own[0].dataset, reader) as responder:
            for way, values in _answered(found, responder, own, judge, (GREEDY, SAMPLED), longer).items():
                scores[way] += values
    return scores


@contextmanager
def _responder(found: Opened, data_set: str, reader: Reader) -> Iterator[Responder]:
    """What answers as the teacher of a data set, which reads its prompts so."""
    teacher, config, tokenizer = found.teachers.by_data_set[data_set], found.config, reader.tokenizer
    chats, environment = chats_of(found.prepared.teacher_prompts.data_sets), found.prepared.environment
    if isinstance(teacher, LocalTeacher):
        with found.teachers.ready(), teacher.writing() as model:
            ends = end_of_sequence(model, tokenizer) if reader.own else found.ends
            sampler = local_sampler(model, eos_token_ids=ends, settings=config.sampling)
            yield make_responder(config, model, tokenizer, sampler, environment, chats)
        return
    server = config.data_sets()[data_set].teacher.server  # type: ignore[union-attr]
    asked = GenerationServer(Connection(server, "the teacher's server"), vocabulary(tokenizer))
    ends = tokenizer_ends(tokenizer) if reader.own else found.ends
    sampler = RemoteSampler(asked, server.model, ends, server.concurrency, "fastkl probe")
    yield make_responder(config, found.student.model, tokenizer, sampler, environment, chats)
