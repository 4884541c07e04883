"""`fastkl score`: a model's log-probs of given completions."""

from __future__ import annotations

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.offline import ScoreConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts, given_samples
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.models import checks
from fastkl.trainer.models.loading import (
    fuse,
    load_teacher,
    load_teacher_tokenizer,
)
from fastkl.trainer.runs.files import new_file, write_jsonl
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.served import connect
from fastkl.trainer.teachers.teacher import Teacher


def score_completions(config: ScoreConfig) -> None:
    """Writes, per row: ids, loss_mask, logprobs (0 for the prompt's tokens), and their sum over the completion.

    The completion is scored with the end-of-sequence token after it, as one that is finished.
    """
    output = new_file(config.output)
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
    write_jsonl(output, rows)
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
