"""What `fastkl eval` and `fastkl sample` share: a model that answers, and its answers in a file that grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.commands.output import Output
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.pretrained import load_model
from fastkl.trainer.models.sizes.flops import Cost, cost_of, writing_flops
from fastkl.trainer.notes import Count, note
from fastkl.trainer.rollouts.answers import Answer, Ask, answers_to
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.single_turn import Responder, SingleTurn
from fastkl.trainer.runs.identity import weights_fingerprint

# Answers that are written at once: as many as a CPU samples in one batch; a GPU is kept busy by more.
AT_ONCE = {"cpu": 64, "accelerator": 512}


class Answering(NamedTuple):
    """A model that is ready to answer."""

    responder: Responder
    at_once: int
    cost: Cost
    weights: str  # a fingerprint


def open_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, asks: Sequence[Ask], remedies: Sequence[str]
) -> Answering:
    """Loads it, and checks that it has room for what it is asked; `remedies` says what to do where it has not."""
    device = PartialState().device
    note(f"{sum(len(ask.each) for ask in asks)} answers to write; loading {config.path}")
    model = load_model(config).to(device)
    checks.check_vocabulary(tokenizer, {"model": model})
    for ask, remedy in zip(asks, remedies, strict=True):
        checks.check_room(list(ask.prompts), ask.max_new_tokens, {"model": model}, remedy)
    sampler = local_sampler(model, eos_token_ids=end_of_sequence(model, tokenizer))
    size = AT_ONCE["cpu" if model.device.type == "cpu" else "accelerator"]
    return Answering(SingleTurn(sampler, context_length(model)), size, cost_of(model), weights_fingerprint(model))


def sources(asks: Iterable[Ask]) -> list[str]:
    """Where the prompts of all answers stand, in the order of the file."""
    return [prompt.row.source for ask in asks for prompt in ask.each]


def write_answers(
    asks: Sequence[Ask],
    model: Answering,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    output: Output,
    row: Callable[[int, int, Answer], dict[str, Any]],
    told: Callable[[], str],
) -> None:
    """Writes what is left, in pieces, which begin at the same answers whenever the command was ended.

    Args:
        row: Makes a row from the number of the ask, that of the answer in it, and the answer.
        told: How it goes, in words.
    """
    if output.rows:
        note(f"{output.path} has {len(output.rows)} of {output.total} answers")
    with Count("answered", output.total, len(output.rows)) as count, output.interruptible():
        first = 0
        for number, ask in enumerate(asks):
            prompts = ask.each
            for start, end in _pieces(ask, len(prompts), model.at_once, len(output.rows) - first):
                output.keep(first + start)
                answers = answers_to(
                    prompts[start:end], ask, model.responder, tokenizer, _seed(seed, end, model.at_once)
                )
                output.add(row(number, start + place, answer) for place, answer in enumerate(answers))
                count.at(len(output.rows), told())
            first += len(prompts)


def _pieces(ask: Ask, total: int, size: int, done: int) -> Iterator[tuple[int, int]]:
    """Where the pieces begin and end that are left of an ask, when so many of its answers are there.

    A piece draws from one random stream, and is answered as a whole; but greedy answers that are there stay.
    """
    for start in range(0, total, size):
        end = min(start + size, total)
        if done < end:
            yield (max(start, done) if ask.temperature == 0 else start), end


def _seed(seed: int, end: int, size: int) -> int:
    return seed + 1_000_003 * ((end - 1) // size)


def answer_row(answer: Answer) -> dict[str, Any]:
    """The row of the data, with the answer as its completion."""
    row = {name: value for name, value in dataclasses.asdict(answer.prompt.row).items() if value is not None}
    graded = {} if answer.score is None else {"score": answer.score}
    return {**row, "completion": answer.text, **graded, "tokens": answer.tokens, "truncated": answer.truncated}


def rows_flops(cost: Cost, prompts: Iterable[EncodedPrompt], rows: Iterable[dict[str, Any]]) -> float:
    """What it took to write the rows of the file."""
    lengths = zip(prompts, (row["tokens"] for row in rows), strict=True)
    return writing_flops(cost, ((len(prompt.tokens), tokens, tokens) for prompt, tokens in lengths))
