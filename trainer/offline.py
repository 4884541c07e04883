"""Commands that use a model without training it: `fastkl eval` and `fastkl score`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from fastkl.trainer import checks
from fastkl.trainer.config.errors import ConfigError
from fastkl.trainer.config.offline import EvaluateConfig, ScoreConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts, given_samples, load_prompts
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.grading.evaluate import evaluate, load_eval_prompts
from fastkl.trainer.models.loading import (
    context_length,
    end_of_sequence,
    fuse,
    load_model,
    load_teacher,
    load_teacher_tokenizer,
    load_tokenizer,
)
from fastkl.trainer.rollouts.writer import SingleTurn
from fastkl.trainer.runs.folder import write_text
from fastkl.trainer.samplers.local import local_sampler
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import connect
from fastkl.trainer.teachers.teacher import Teacher


def evaluate_model(config: EvaluateConfig) -> dict[str, float]:
    """Prints `eval/*` as one JSON line; writes the graded answers if asked to."""
    output = None if config.output is None else _new_file(config.output)
    tokenizer = load_tokenizer(config.model)
    prompts = load_eval_prompts(config.eval, tokenizer)
    model = load_model(config.model).to(PartialState().device)
    checks.check_vocabulary(tokenizer, {"model": model})
    checks.check_eval_room(prompts, config.eval, "model", model)
    sampler = local_sampler(model, eos_token_ids=end_of_sequence(model, tokenizer))
    writer = SingleTurn(sampler, context_length(model))
    metrics, answers = evaluate(writer, tokenizer, prompts, config.eval, config.seed)
    if output is not None:
        rows = ({**vars(answer.prompt.row), "completion": answer.text, "score": answer.score} for answer in answers)
        _write_rows(output, rows)
    print(json.dumps(metrics))
    return metrics


def score_completions(config: ScoreConfig) -> None:
    """Writes, per row: ids, loss_mask, logprobs (0 for the prompt's tokens), and their sum over the completion.

    The completion is scored with the end-of-sequence token after it, as one that is finished.
    """
    output = _new_file(config.output)
    tokenizer = load_teacher_tokenizer(config.model)
    assert tokenizer is not None  # ScoreConfig demands one
    prompts = encode_prompts(load_prompts(config.data), tokenizer, config.data)
    samples = given_samples(prompts, tokenizer)
    _scorer(config, tokenizer, prompts, samples).score(samples)
    rows = (
        {
            "source": prompts[sample.prompt_index].row.source,
            "ids": sample.ids,
            "loss_mask": sample.loss_mask,
            "logprobs": sample.teacher_logprobs,
            "sum": sum(sample.teacher_logprobs),
        }
        for sample in samples
    )
    _write_rows(output, rows)
    print(f"{len(samples)} rows written to {output}")


def _scorer(
    config: ScoreConfig, tokenizer: PreTrainedTokenizerBase, prompts: list[EncodedPrompt], samples: list[Sample]
) -> Teacher:
    lengths = [sample.loss_tokens for sample in samples]
    if config.model.server.url:
        checks.check_room(prompts, lengths, {}, checks.SHORTER_ROW)
        longest = max((sample.ids for sample in samples), key=len)
        temperature, remedy = config.temperature, checks.SHORTER_ROW
        return connect(config.model, tokenizer, temperature=temperature, longest=longest, remedy=remedy)
    device: torch.device = PartialState().device
    model = load_teacher(config.model, device)
    checks.check_vocabulary(tokenizer, {"model": model})
    checks.check_room(prompts, lengths, {"model": model}, checks.SHORTER_ROW)
    return LocalTeacher(fuse(model, "model"), config.batch, config.temperature, device)


def _new_file(name: str) -> Path:
    path = Path(name)
    if path.exists():
        raise ConfigError(f"output {path} exists already; move it away or choose another name")
    return path


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
