"""`fastkl sample`: a model's completions of prompts, in a file that `fastkl sft` reads as it is."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
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
from fastkl.trainer.config.offline import KeepConfig, SampleConfig
from fastkl.trainer.data.prompts import encode_prompts
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.models import checks
from fastkl.trainer.notes import note
from fastkl.trainer.rollouts.answers import Answer, Ask
from fastkl.trainer.rollouts.grading.named import named_grader
from fastkl.trainer.rollouts.grading.statistics import mean, standard_error
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.identity import rows_fingerprint

FIELDS: Fields = {"completion": str, "sample": int, "tokens": int, "truncated": bool}
GRADED: Fields = {**FIELDS, "score": (int, float)}
RECENT = 1000  # completions, whose mean score is shown meanwhile


def sample_completions(config: SampleConfig) -> dict[str, Any]:
    """Writes the completions as they come, then those that are kept; prints what they came to as one JSON line.

    The same command goes on with the files that it began.
    """
    processes.join()
    settings = {**dataclasses.asdict(config), "model": model_settings(config.model)}
    del settings["output"], settings["keep"]
    fields = FIELDS if config.grader is None else GRADED
    rule = dataclasses.asdict(config.keep)
    with ExitStack() as files:
        output = files.enter_context(Output(config.output, settings, fields))
        kept = files.enter_context(Output(rule.pop("path"), {**settings, "keep": rule}, fields, "keep.path"))
        tokenizer = writer_tokenizer(config.model)
        prompts = encode_prompts(load_prompts(config.data, all_columns=True), tokenizer, config.data)
        grader = None
        if config.grader is not None:
            grader = named_grader("grader", config.grader, trusted=config.trust_grader)
            grader.check_rows(prompts, "grading")
        sampling = config.sampling
        ask = Ask(prompts, sampling.samples_per_prompt, sampling.temperature, sampling.max_new_tokens, grader)
        model = open_writer(config.model, sampling, tokenizer, [ask], [checks.SHORTER.format("sampling", "data")])
        content = {"rows": rows_fingerprint(prompts), "weights": model.weights}
        output.begin(sources([ask]), **content)

        def row(_: int, place: int, answer: Answer) -> dict[str, Any]:
            return {**answer_row(answer, tokenizer), "sample": place % ask.samples}

        def told() -> str:
            return (
                "" if grader is None else f"recent scores {mean([row['score'] for row in output.rows[-RECENT:]]):.3f}"
            )

        write_answers([ask], model, tokenizer, config.seed, output, row, told)
        found = _summary(output.rows, rows_flops(model.cost, ask.each, output.rows))
        if kept.path is not None:
            rows = list(_kept(config.keep, output.rows))
            kept.begin([row["source"] for row in rows], **content)
            kept.add(rows[len(kept.rows) :])
            found["kept"] = len(rows)
    _say(config, found)
    return found


def _kept(rule: KeepConfig, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows that pass, in their order."""
    had = defaultdict[str, list[str]](list)
    for row in rows:
        passes = (rule.truncated or not row["truncated"]) and (rule.min_score is None or row["score"] >= rule.min_score)
        before, said = had[row["source"]], row["completion"]
        room = rule.per_prompt is None or len(before) < rule.per_prompt
        if passes and room and not (rule.distinct and said in before):
            before.append(said)
            yield row


def _summary(rows: Sequence[dict[str, Any]], flops: float | None) -> dict[str, Any]:
    """What the line of JSON says; a mean score with its standard error by prompt."""
    scores = [row["score"] for row in rows if "score" in row]
    error = standard_error(scores, [row["source"] for row in rows]) if scores else None
    found = {
        "completions": len(rows),
        "mean_score": mean(scores) if scores else None,
        "mean_score_se": error,
        "tokens": sum(row["tokens"] for row in rows),
        "mean_length": mean([row["tokens"] for row in rows]),
        "truncated_fraction": mean([row["truncated"] for row in rows]),
        "flops": flops,
    }
    return {name: value for name, value in found.items() if value is not None}


def _say(config: SampleConfig, found: dict[str, Any]) -> None:
    if processes.rank() != 0:
        return
    if found.get("kept", found["completions"]):
        note(f"to learn them, with your model for STUDENT: {' '.join(map(shlex.quote, learned(config)))}")
    print(json.dumps(found), flush=True)


def learned(config: SampleConfig) -> list[str]:
    """The command that learns what was written."""
    settings = {"data.path": config.keep.path or config.output}
    if not config.data.chat_template:
        settings["data.chat_template"] = "false"
    if config.data.template_kwargs:
        settings["data.template_kwargs"] = json.dumps(config.data.template_kwargs)
    own = ["--run", "runs/sft", "--student.path", "STUDENT"]
    return ["fastkl", "sft", *own, *(word for name, value in settings.items() for word in (f"--{name}", value))]
