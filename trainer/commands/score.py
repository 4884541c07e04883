"""`fastkl score`: a model's log-probs of given completions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.commands.output import Fields, Output
from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.offline import ScoreConfig
from fastkl.trainer.data.arrays import total
from fastkl.trainer.data.prompts import EncodedPrompt, Given, Prompts, encode_prompts, given_samples
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models import checks
from fastkl.trainer.models.loading import (
    fuse,
    load_teacher,
    load_teacher_tokenizer,
)
from fastkl.trainer.models.self_checks.layouts import batch_layout
from fastkl.trainer.models.self_checks.probe import Probe
from fastkl.trainer.notes import Count, note
from fastkl.trainer.runs.identity import rows_fingerprint, weights_fingerprint
from fastkl.trainer.teachers.alignment.reader import Reader
from fastkl.trainer.teachers.cached import Cacheable, cached, spared_metrics
from fastkl.trainer.teachers.context.functions import context_function
from fastkl.trainer.teachers.context.prompts import fixed_prompts
from fastkl.trainer.teachers.context.siblings import Siblings
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import connect
from fastkl.trainer.teachers.teacher import Lists

AT_ONCE = 256  # completions that are scored and written at once
SETTING = "model.context"
FIELDS: Fields = {"ids": list, "loss_mask": list, "logprobs": list, "sum": (int, float)}


def score_completions(config: ScoreConfig) -> None:
    """Writes, per row: ids, loss_mask, logprobs (0 for the prompt's tokens), and their sum over the completion.

    The completion is scored with the end-of-sequence token after it, as one that is finished. With `model.context`, it
    follows what that makes of the prompt: the ids are those that the model reads.
    """
    with Output(config.output, _settings(config), FIELDS) as output:
        tokenizer = load_teacher_tokenizer(config.model)
        assert tokenizer is not None  # ScoreConfig demands one
        prompts = encode_prompts(load_prompts(config.data, config.model.context.columns), tokenizer, config.data)
        given = given_samples(prompts, tokenizer)
        if config.model.context != ContextConfig():
            prompts = _with_context(config.model.context, prompts, tokenizer)
            given = Given(prompts, given.completions)
        note(f"{len(given)} completions read and encoded")
        scorer = _scorer(config, tokenizer, given)
        cache = cached(config.model, scorer, Lists(), config.temperature)
        weights = weights_fingerprint(scorer.model) if isinstance(scorer, LocalTeacher) else "a server's"
        sources, samples = [prompt.row.source for prompt in prompts], [*given]
        output.begin(sources, rows=rows_fingerprint(prompts), weights=weights)
        with Count("scored", len(samples), len(output.rows)) as count, output.interruptible():
            while len(output.rows) < len(samples):
                piece = samples[len(output.rows) : len(output.rows) + AT_ONCE]
                (cache or scorer).score(piece)
                if len(output.rows) + len(piece) == len(samples):
                    scorer.recheck()
                output.add(_row(sample, prompts[sample.prompt_index]) for sample in piece)
                count.at(len(output.rows))
        spared = spared_metrics(samples)
        if spared:
            note(f"{spared['teacher_cache/hits']:.0f} completions had scores in {config.model.cache}")
    print(f"{len(samples)} rows written to {output.path}")


def _with_context(context: ContextConfig, prompts: Prompts, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    function = context_function(context, SETTING)
    if isinstance(function, Siblings) or (function is not None and function.of_samples):
        raise ConfigError(
            f"{SETTING}.function is {context.function!r}, which reads samples, but there are no samples here; name a "
            f"function that takes (row)"
        )
    return fixed_prompts(prompts, context, function, Reader(tokenizer), SETTING)


def _row(sample: Sample, prompt: EncodedPrompt) -> dict[str, Any]:
    return {
        "source": prompt.row.source,
        "ids": sample.ids.tolist(),
        "loss_mask": sample.loss_mask.tolist(),
        "logprobs": sample.teacher_logprobs.tolist(),
        "sum": total(sample.teacher_logprobs),
    }


def _settings(config: ScoreConfig) -> dict[str, Any]:
    """What the rows depend on: not how many tokens are in a forward pass, nor how a server is reached."""
    settings = dataclasses.asdict(config)
    del settings["output"], settings["batch"]
    settings["model"]["server"] = config.model.server.model
    del settings["model"]["cache"], settings["model"]["cache_gigabytes"]
    return settings


def _scorer(config: ScoreConfig, tokenizer: PreTrainedTokenizerBase, given: Given) -> Cacheable:
    if config.model.server.url:
        checks.check_given(given, {})
        longest = given.longest()
        temperature, remedy = config.temperature, checks.SHORTER_ROW
        return connect(config.model, tokenizer, temperature=temperature, longest=longest, remedy=remedy)
    device: torch.device = PartialState().device
    model = load_teacher(config.model, device)
    checks.check_vocabulary(tokenizer, {"model": model})
    checks.check_given(given, {"model": model})
    layout = batch_layout(config.batch, fuse(model, "model"), Probe(model, "model"))
    return LocalTeacher(model, layout, config.batch.max_tokens, config.temperature, device)
