"""What works for a model: sampled, batched, updated, saved and adapted by the trainer's parts, beside plain forwards.

Every check says "yes", the way that was taken ("generate"), "refused" with the sentence, "wrong" with the size of the
error, or the exception that a user would see as a traceback.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from run_cases import fresh_accelerate
from run_settings import config, distillation
from tiny_models import tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from fastkl.trainer.config.models import StudentConfig
from fastkl.trainer.data.samples import Completion, Sample, make_sample
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.models.pretrained import load_model
from fastkl.trainer.models.saving import save_student
from fastkl.trainer.objectives.registry import make_objective
from fastkl.trainer.rollouts.samplers import local
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.local import local_sampler
from fastkl.trainer.student import Student

WORDS = tokenizer()
END = 0
TOLERANCE = 2e-4  # nats: what float32 rounds where sums are taken in another order
PROMPTS = [[random.Random(seed).randrange(5, 48) for _ in range(length)] for seed, length in enumerate((3, 21, 8, 13))]
NEW_TOKENS = 12
COLUMNS = ("cpu", "gpu", "batches", "packed", "update", "saved", "lora")

Found = dict[str, str]


def examine(model: PreTrainedModel, folder: Path) -> Found:
    """Everything that a run does with a model as its student, column by column."""
    model.save_pretrained(folder / "model")
    WORDS.save_pretrained(folder / "model")
    found: Found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student, refusal = _attempt(lambda: _student(folder))
        if student is None:
            return dict.fromkeys(COLUMNS, refusal)
        samples: dict[str, list[Sample]] = {}
        for column, quicker in (("cpu", True), ("gpu", False)):
            found[column] = _said(lambda: _sampled(student, quicker, samples, column))  # noqa: B023
        if found["cpu"].startswith("refused"):
            return dict.fromkeys(COLUMNS, found["cpu"])
        rows = samples.get("cpu") or _given()
        found["batches"] = _said(lambda: _scored(student, rows))
        found["packed"] = _said(lambda: _packed(folder, rows))
        found["update"] = _said(lambda: _updated(student, rows))
        found["saved"] = _said(lambda: _saved(student.model, folder / "saved"))
        found["lora"] = _said(lambda: _adapted(folder, rows))
    return found


def _attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or what is said instead."""
    try:
        return make(), ""
    except (ConfigError, RunError) as error:
        return None, f"refused: {error}"
    except Exception as error:  # whatever a user would see
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _said(check: Callable[[], str]) -> str:
    found, said = _attempt(check)
    return said if found is None else found


def _student(folder: Path, **overrides: object) -> Student:
    fresh_accelerate()
    settings = distillation(folder / "run", folder, student__path=folder / "model", **overrides)
    return Student(config("distill", settings), Accelerator(cpu=True))


@contextmanager
def _quicker(generate: bool) -> Iterator[None]:
    """`auto` chooses as on a CPU, where generate is the quicker one, or as on an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "generate_is_quicker", lambda model: generate)
        yield


def _sampled(student: Student, generate: bool, samples: dict[str, list[Sample]], column: str) -> str:
    """The way that `auto` picks; completions have the model's own log-probs."""
    with _quicker(generate):
        sampler = local_sampler(student.model, eos_token_ids=[END])
    completions = sampler.sample(PROMPTS, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=1)
    samples[column] = [
        make_sample(prompt, done.token_ids, index, done.logprobs)
        for index, (prompt, done) in enumerate(zip(PROMPTS, completions, strict=True))
    ]
    return _within(samples[column], "sampler_logprobs", student.model) or _way(sampler)


def _way(sampler: Any) -> str:
    if isinstance(sampler, ContinuousBatchingSampler):
        return "continuous batching"
    if sampler._one_length:
        return "generate, one length"
    return "generate, one prompt" if sampler._max_requests == 1 else "generate"


def _given() -> list[Sample]:
    completions = [Completion(prompt[::-1], [0.0] * len(prompt), False) for prompt in PROMPTS]
    pairs = zip(PROMPTS, completions, strict=True)
    return [make_sample(prompt, done.token_ids, index) for index, (prompt, done) in enumerate(pairs)]


def _scored(student: Student, samples: list[Sample]) -> str:
    """The layout that `auto` picks: all samples in a few batches, against each alone."""
    student.score(samples, "old_logprobs", 1.0)
    return _within(samples, "old_logprobs", student.model) or student.layout


def _packed(folder: Path, samples: list[Sample]) -> str:
    student = _student(folder, batch__layout="packed")
    return "yes" if _scored(student, samples) == "packed" else _scored(student, samples)


def _updated(student: Student, samples: list[Sample]) -> str:
    """Self-distillation: the update sees the log-probs that were sampled with; then it moves the weights."""
    objective = make_objective(student.config.loss, student.config.sampling, None)
    for sample in samples:
        sample.sampler_logprobs = [float(value) for value in plain_logprobs(student.model, sample)]
        sample.advantages = [
            float(counted) * (1.0 - 2.0 * (place % 2)) for place, counted in enumerate(sample.loss_mask)
        ]
        sample.old_logprobs = []
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    metrics = student.update(samples, objective, 0)
    mismatch = metrics["sampler_mismatch/mean_abs"]
    if not mismatch < TOLERANCE:
        return f"wrong by {mismatch:.2g}"
    if metrics["optim/skipped"] or not all(value.isfinite().all() for value in student.model.parameters()):
        return "wrong: no finite gradient"
    trained = [name for name, value in student.model.named_parameters() if value.requires_grad]
    moved = sum(not torch.equal(before[name], dict(student.model.named_parameters())[name]) for name in trained)
    return "yes" if 2 * moved > len(trained) else f"wrong: {moved} of {len(trained)} weights moved"


def _saved(model: Any, folder: Path) -> str:
    trained = logits(model)
    save_student(model, WORDS, folder)
    reloaded = load_model(StudentConfig(path=str(folder)))
    kind: Any = type(reloaded)
    found = kind.from_pretrained(folder, output_loading_info=True)[1]
    lost = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    error = float((logits(reloaded) - trained).abs().max())
    if lost:
        return f"wrong: {len(lost)} keys, such as {sorted(map(str, lost))[0]}"
    return "yes" if error <= TOLERANCE else f"wrong by {error:.2g}"


def _adapted(folder: Path, samples: list[Sample]) -> str:
    """An adapter with weights of its own: updated, merged, saved and loaded again."""
    student = _student(folder, student__lora__rank=2)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    updated = _updated(student, samples)
    return _saved(student.model, folder / "adapted") if updated == "yes" else updated


def logits(model: Any) -> Tensor:
    """[n, V], each prompt alone."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float() for ids in PROMPTS]
    model.train(training)
    return torch.cat([rows.log_softmax(-1) for rows in found])


def plain_logprobs(model: Any, sample: Sample) -> Tensor:
    """[T] of a sample alone, in a plain forward pass; 0 where nothing comes before."""
    training = model.training
    model.eval()
    ids = torch.tensor(sample.ids).long()[None]
    with torch.no_grad():
        rows = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    model.train(training)
    found = torch.zeros(len(sample.ids))
    found[1:] = rows.gather(1, ids[0, 1:, None])[:, 0]
    return found * torch.tensor(sample.loss_mask)


def _within(samples: list[Sample], field: str, model: Any) -> str | None:
    """None where a list of the samples has the model's log-probs."""
    error = max(
        float((torch.tensor(getattr(sample, field)) - plain_logprobs(model, sample)).abs().max()) for sample in samples
    )
    return None if error <= TOLERANCE else f"wrong by {error:.2g}"
