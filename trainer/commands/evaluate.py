"""`fastkl eval`: a model's answers to prompts, graded."""

from __future__ import annotations

import dataclasses
import json

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastkl.trainer.commands.output import Fields, Output
from fastkl.trainer.config.offline import EvaluateConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.models import checks
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.loading import context_length
from fastkl.trainer.models.pretrained import load_model, load_tokenizer
from fastkl.trainer.notes import Count, note
from fastkl.trainer.rollouts.evaluation import Answer, evaluate, load_eval_prompts, summary
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.rollouts.single_turn import SingleTurn
from fastkl.trainer.runs import processes
from fastkl.trainer.runs.identity import rows_fingerprint, weights_fingerprint

# Prompts that are answered and written at once: as many as a CPU samples in one batch; a GPU is kept busy by more.
AT_ONCE = {"cpu": 64, "accelerator": 512}
FIELDS: Fields = {"score": (int, float), "tokens": int, "truncated": bool}  # of a row, what the summary reads


def evaluate_model(config: EvaluateConfig) -> dict[str, float]:
    """Prints `eval/*` as one JSON line; writes the graded answers as they come, if asked to, and goes on with a file."""
    device = PartialState().device
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "output"}
    with Output(config.output, settings, FIELDS) as output:
        tokenizer = load_tokenizer(config.model)
        prompts = load_eval_prompts(config.eval, tokenizer)
        note(f"{len(prompts)} prompts read and encoded; loading {config.model.path}")
        model = load_model(config.model).to(device)
        checks.check_vocabulary(tokenizer, {"model": model})
        checks.check_eval_room(prompts, config.eval, "model", model)
        sources = [prompt.row.source for prompt in prompts]
        output.begin(sources, rows=rows_fingerprint(prompts), weights=weights_fingerprint(model))
        _answer(config, model, tokenizer, prompts, output)
    metrics = summary(output.rows)
    if processes.rank() == 0:
        print(json.dumps(metrics), flush=True)
    return metrics


def _answer(
    config: EvaluateConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[EncodedPrompt],
    output: Output,
) -> None:
    """Answers what is left, in pieces, which begin at the same rows whenever the command was ended."""
    sampler = local_sampler(model, eos_token_ids=end_of_sequence(model, tokenizer))
    responder = SingleTurn(sampler, context_length(model))
    size = AT_ONCE["cpu" if model.device.type == "cpu" else "accelerator"]
    if config.eval.temperature > 0 and len(output.rows) < len(prompts):  # a piece draws from one random stream
        output.keep(len(output.rows) // size * size)
    if output.rows:
        note(f"{config.output} has {len(output.rows)} of {len(prompts)} answers")
    with Count("answered", len(prompts), len(output.rows)) as count, output.interruptible():
        while len(output.rows) < len(prompts):
            piece = len(output.rows) // size
            left = prompts[len(output.rows) : (piece + 1) * size]
            _, answers = evaluate(responder, tokenizer, left, config.eval, config.seed + 1_000_003 * piece)
            output.add(map(_row, answers))
            count.at(len(output.rows), f"accuracy {summary(output.rows)['eval/accuracy']:.3f}")


def _row(answer: Answer) -> dict[str, object]:
    row = {name: value for name, value in dataclasses.asdict(answer.prompt.row).items() if value is not None}
    graded = {"completion": answer.text, "score": answer.score}
    return {**row, **graded, "tokens": answer.tokens, "truncated": answer.truncated}
