"""`fastkl eval`: a model's answers to prompts, graded."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastkl.trainer.commands.answering import (
    answer_row,
    model_settings,
    open_writer,
    rows_flops,
    sources,
    write_answers,
    writer_tokenizer,
)
from fastkl.trainer.commands.output import Fields, Output
from fastkl.trainer.config.offline import EvaluateConfig
from fastkl.trainer.rollouts.answers import Answer
from fastkl.trainer.rollouts.evaluation import FLOPS, Evaluation, load_evaluations
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.identity import rows_fingerprint

FIELDS: Fields = {"score": (int, float), "tokens": int, "truncated": bool}  # of a row, what the summary reads


def evaluate_model(config: EvaluateConfig) -> dict[str, float]:
    """Prints `eval/*` as one JSON line; writes the graded answers as they come, if asked to, and goes on with a file."""
    processes.join()
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    settings["model"] = model_settings(config.model)
    with Output(config.output, settings, FIELDS) as output:
        tokenizer = writer_tokenizer(config.model)
        evaluations = load_evaluations(config.eval, tokenizer)
        asks = [one.ask for one in evaluations]
        remedies = [one.remedy for one in evaluations]
        model = open_writer(config.model, config.sampling, tokenizer, asks, remedies)
        prompts = [prompt for ask in asks for prompt in ask.each]
        output.begin(sources(asks), rows=rows_fingerprint(prompts), weights=model.weights)

        def row(number: int, place: int, answer: Answer) -> dict[str, Any]:
            one = evaluations[number]
            of = {"set": one.name, "temperature": one.ask.temperature, "sample": place % one.ask.samples}
            return answer_row(answer, tokenizer) | of

        def told() -> str:
            one, answers = list(_parts(evaluations, output.rows))[-1]
            return f"accuracy {one.accuracy(answers):.3f}"

        write_answers(asks, model, tokenizer, config.seed, output, row, told)
    metrics = dict[str, float]()
    for one, answers in _parts(evaluations, output.rows):
        metrics |= one.summary(answers)
    if (flops := rows_flops(model.cost, prompts, output.rows)) is not None:
        metrics[FLOPS] = flops
    if processes.rank() == 0:
        print(json.dumps(metrics), flush=True)
    return metrics


def _parts(
    evaluations: Sequence[Evaluation], rows: Sequence[dict[str, Any]]
) -> Iterator[tuple[Evaluation, list[dict[str, Any]]]]:
    """Each evaluation that has rows, with them."""
    left = iter(rows)
    for one in evaluations:
        if part := list(itertools.islice(left, len(one.ask.each))):
            yield one, part
