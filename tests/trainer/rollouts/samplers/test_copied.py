"""Sampling from a copy in another dtype: what is copied and when, whose samples those are, and runs that use it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from run_cases import check_equal, interrupt, run
from run_settings import arguments, distillation
from tiny_models import causal_lm
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.copied import CopySampler, rounded

PROMPTS = [[5, 9, 12], [7], [20, 21, 22, 23]]


def sample(sampler: Any, seed: int = 0) -> list[Any]:
    found: list[Any] = sampler.sample(PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed)
    return found


def test_a_copy_has_rounded_parameters_and_its_own_of_everything() -> None:
    model: Any = causal_lm(tie_word_embeddings=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made: Any = rounded(model, torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert torch.equal(
        made.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    )  # float32: long contexts need it
    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16())
    assert model.training
    assert not made.training
    assert model.config.dtype != torch.bfloat16
    for parameter in made.parameters():
        parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_samples_are_those_of_the_model_loaded_in_that_dtype(tmp_path: Path, kind: str) -> None:
    model: Any = causal_lm(kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    student: Any = SimpleNamespace(model=model, version=0)
    ours = sample(CopySampler(student, torch.bfloat16, ContinuousBatchingSampler))
    assert ours == sample(ContinuousBatchingSampler(loaded))
    assert ours != sample(ContinuousBatchingSampler(model))


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_version_of_the_student_is_taken_over(lora: bool) -> None:
    model: Any = causal_lm()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    student: Any = SimpleNamespace(model=model, version=0)
    sampler = CopySampler(student, torch.bfloat16, ContinuousBatchingSampler)
    first = sample(sampler)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    assert sample(sampler) == first  # of the same version: nothing is copied
    student.version = 1
    assert sample(sampler) == sample(CopySampler(student, torch.bfloat16, ContinuousBatchingSampler)) != first


def test_a_run_says_how_far_the_copy_is_and_learns(tmp_path: Path, padded: Path) -> None:
    done = run(tmp_path / "run", padded, sampling__dtype="bfloat16", optim__steps=12, optim__lr=0.02)
    plain = run(tmp_path / "plain", padded, optim__steps=1)
    assert plain.metrics[0]["sampler_mismatch/mean_abs"] < 1e-5
    assert all(1e-5 < row["sampler_mismatch/mean_abs"] < 0.05 for row in done.metrics)
    assert {tensor.dtype for tensor in done.weights().values()} == {torch.float32}
    first, last = (sum(row["teacher_kl"] for row in rows) for rows in (done.metrics[:3], done.metrics[-3:]))
    assert last < first


def test_an_interrupted_run_goes_on_exactly(tmp_path: Path, padded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sampling__dtype": "bfloat16", "optim__steps": 4, "checkpoint__every": 2}
    whole = run(tmp_path / "whole", padded, **options).folder
    settings = distillation(tmp_path / "run", padded, **options)
    interrupt(monkeypatch, settings, step=3)
    assert cli.main(arguments("distill", settings)) == 0
    check_equal(tmp_path / "run", whole)
