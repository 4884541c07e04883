"""Answers of a run's checkpoints to held-out problems: the likeliest, and sampled at temperature 1."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from series import Row

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.models.ends import end_of_sequence
from fastkl.trainer.models.pretrained import load_model, load_tokenizer
from fastkl.trainer.rollouts.grading.graders import last_number
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.runs.checkpoint import WEIGHTS

TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
NEW_TOKENS = 24
SEED = 20  # of the answers: the same for all students


def graded(student: Path, rows: Path) -> Row:
    """Accuracies of a saved student."""
    model, tokenizer = _load(student)
    return _accuracies(model, tokenizer, _prompts(rows, tokenizer))


def graded_checkpoints(run: Path, start: Path, rows: Path) -> list[Row]:
    """Accuracies of the run's checkpoints, by their steps. `start` has the architecture."""
    model, tokenizer = _load(start)
    prompts = _prompts(rows, tokenizer)
    found = []
    for step, folder in checkpoints(run):
        with torch.no_grad():
            for name, weight in load_file(folder / WEIGHTS).items():
                model.get_parameter(name.removeprefix("model.")).copy_(weight)
        found.append({"step": step, **_accuracies(model, tokenizer, prompts)})
    return found


def checkpoints(run: Path) -> Iterator[tuple[int, Path]]:
    steps = {int(re.sub(r"\D", "", path.name)): path for path in (run / "checkpoints").glob("step*")}
    return iter(sorted(steps.items()))


def _load(path: Path) -> tuple[Any, Any]:
    config = ModelConfig(path=str(path))
    return load_model(config), load_tokenizer(config)


def _prompts(rows: Path, tokenizer: Any) -> list[EncodedPrompt]:
    data = DataConfig(path=str(rows))
    return encode_prompts(load_prompts(data), tokenizer, data)


def _accuracies(model: Any, tokenizer: Any, prompts: list[EncodedPrompt]) -> Row:
    sampler = GenerateSampler(model, eos_token_ids=end_of_sequence(model, tokenizer), max_requests=len(prompts))
    found: Row = {}
    for name, temperature in TEMPERATURES.items():
        answers = sampler.sample(
            [prompt.ids for prompt in prompts], max_new_tokens=NEW_TOKENS, temperature=temperature, seed=SEED
        )
        texts = tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
        right = [last_number(text, prompt.row.answer or "") for text, prompt in zip(texts, prompts, strict=True)]
        found[name] = round(sum(right) / len(right), 4)
    return found
