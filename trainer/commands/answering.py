"""What `fastkl eval` and `fastkl sample` share: a model that answers, and its answers in a file that grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.commands.output import Output
from fastkl.trainer.config.data import BESIDE
from fastkl.trainer.config.models import WriterConfig
from fastkl.trainer.config.sampling import EngineConfig
from fastkl.trainer.data.batching import PAD_ID
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence, tokenizer_ends
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.pretrained import load_model, load_tokenizer, outline
from fastkl.trainer.models.sizes.flops import Cost, cost_of, writing_flops
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT
from fastkl.trainer.notes import Count, note
from fastkl.trainer.rollouts.answers import Answer, Ask, answers_to, completion_of
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.samplers.remote import RemoteSampler
from fastkl.trainer.rollouts.single_turn import Responder, SingleTurn
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.identity import weights_fingerprint
from fastkl.trainer.servers.check_sampling import PROBE_TOKENS, check_sampling
from fastkl.trainer.servers.connection import Connection
from fastkl.trainer.servers.generation import GenerationServer

# Answers that are written at once: as many as a CPU samples in one batch; a GPU is kept busy by more.
AT_ONCE = {"cpu": 64, "accelerator": 512}


class Answering(NamedTuple):
    """A model that is ready to answer."""

    responder: Responder
    at_once: int
    cost: Cost | None  # of a forward pass; None: of a served model nobody knows it
    weights: str  # a fingerprint


def writer_tokenizer(config: WriterConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(dataclasses.replace(config, path=config.path or config.tokenizer or ""))


def open_writer(
    config: WriterConfig,
    sampling: EngineConfig,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    remedies: Sequence[str],
) -> Answering:
    """Loads the model, or asks its server, and checks that it has room; `remedies` says what to do where it has not."""
    device = processes.join().device
    note(f"{sum(len(ask.each) for ask in asks)} answers to write by {config.path or config.server.model}")
    if config.server.url:
        return _served(config, tokenizer, asks, remedies)
    model = load_model(config).to(device)
    checks.check_vocabulary(tokenizer, {"model": model})
    for ask, remedy in zip(asks, remedies, strict=True):
        checks.check_room(ask.prompts, ask.max_new_tokens, {"model": model}, remedy)
    sampler = local_sampler(model, eos_token_ids=end_of_sequence(model, tokenizer), settings=sampling)
    size = max(AT_ONCE["cpu" if model.device.type == "cpu" else "accelerator"], sampling.max_requests or 0)
    return Answering(SingleTurn(sampler, context_length(model)), size, cost_of(model), weights_fingerprint(model))


def _served(
    config: WriterConfig, tokenizer: PreTrainedTokenizerBase, asks: Sequence[Ask], remedies: Sequence[str]
) -> Answering:
    outlined = _outline(config)
    known = max(tokenizer.get_vocab().values()) + 1
    size = known if outlined is None else max(known, outlined.config.get_text_config().vocab_size)
    server = GenerationServer(Connection(config.server, "the model's server"), size)
    longest, remedy = max(
        (int(ask.prompts.ids.lengths.max()) + ask.max_new_tokens, remedy)
        for ask, remedy in zip(asks, remedies, strict=True)
    )
    processes.on_main(
        lambda: check_sampling(
            server,
            config.server.model,
            tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"][:PROBE_TOKENS],
            temperature=1.0,  # of another one only an importance ratio would have to know the log-probs
            highest=known - 1,
            longest=[PAD_ID] * longest,
            remedy=remedy,
        )
    )
    ends = tokenizer_ends(tokenizer) if outlined is None else end_of_sequence(outlined, tokenizer)
    sampler = RemoteSampler(server, config.server.model, ends, config.server.concurrency, "fastkl")
    cost = None if outlined is None else cost_of(outlined)
    return Answering(SingleTurn(sampler, None), AT_ONCE["accelerator"], cost, "a server's")


def _outline(config: WriterConfig) -> PreTrainedModel | None:
    """The served model without its weights, where its config stands beside its tokenizer."""
    try:
        return outline(dataclasses.replace(config, path=config.tokenizer or ""))
    except ConfigError:
        note(f"{config.tokenizer} holds no config of a model: FLOPs are not counted")
        return None


def model_settings(config: WriterConfig) -> dict[str, Any]:
    """What the rows depend on: not how a server is reached."""
    return {**dataclasses.asdict(config), "server": config.server.model}


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
            for piece, start, end in _pieces(ask, len(prompts), model.at_once, len(output.rows) - first):
                output.keep(first + start)
                own_seed = seed + 1_000_003 * piece
                answers = answers_to(prompts[start:end], ask, model.responder, tokenizer, own_seed)
                output.add(row(number, start + place, answer) for place, answer in enumerate(answers))
                count.at(len(output.rows), told())
            first += len(prompts)


def _pieces(ask: Ask, total: int, size: int, done: int) -> Iterator[tuple[int, int, int]]:
    """The pieces that are left of an ask when so many of its answers are there: number, beginning, end.

    A piece draws from one random stream, and is answered as a whole; but greedy answers that are there stay.
    """
    for piece, start in enumerate(range(0, total, size)):
        end = min(start + size, total)
        if done < end:
            yield piece, (max(start, done) if ask.temperature == 0 else start), end


def answer_row(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The row of the data with the answer as its completion, as `fastkl sft` reads it; of an older answer nothing stays."""
    row = answer.prompt.row
    own = {"answer": row.answer, "metadata": row.metadata or None, "tools": row.tools, "score": answer.score}
    return {
        **{name: value for name, value in row.more.items() if name not in BESIDE},
        "source": row.source,
        "prompt": row.prompt,
        "completion": completion_of(answer, tokenizer),
        **{name: value for name, value in own.items() if value is not None},
        "tokens": answer.tokens,
        "truncated": answer.truncated,
    }


def rows_flops(cost: Cost | None, prompts: Iterable[EncodedPrompt], rows: Iterable[dict[str, Any]]) -> float | None:
    """What it took to write the rows of the file; None where that is not known."""
    if cost is None:
        return None
    lengths = zip(prompts, (row["tokens"] for row in rows), strict=True)
    return writing_flops(cost, ((len(prompt.tokens), tokens, tokens) for prompt, tokens in lengths))
