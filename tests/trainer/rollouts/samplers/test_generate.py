"""Sampling by `generate`: kinds of models that continuous batching lacks, and the choice between the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import run
from sampler_cases import check, make_model, make_prompts
from tiny_data import sums, write_jsonl
from tiny_models import tokenizer
from transformers import PreTrainedModel

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.samplers import local
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.rollouts.samplers.local import local_sampler

RECURRENT: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "mamba": {"state_size": 8},
}


def recurrent(kind: str, **settings: Any) -> PreTrainedModel:
    return make_model(kind, "eager" if kind == "mamba" else "sdpa", **RECURRENT[kind], **settings)


@pytest.mark.parametrize("kind", RECURRENT)
def test_such_models_are_not_given_to_the_other_engine(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "generate_is_quicker", lambda _: False)
    assert isinstance(local_sampler(recurrent(kind), eos_token_ids=[]), GenerateSampler)


@pytest.mark.parametrize("kind", RECURRENT)
def test_models_with_layers_that_carry_a_state(kind: str) -> None:
    model, prompts = recurrent(kind), make_prompts(12)
    sampler = local_sampler(model, eos_token_ids=[2])
    assert isinstance(sampler, GenerateSampler)
    check(model, prompts, sampler.sample(prompts, max_new_tokens=8, temperature=0.7, seed=0), 0.7)


def test_eager_attention_with_a_soft_cap() -> None:
    model, prompts = make_model("gemma2", attn_logit_softcapping=2.0), make_prompts(8)
    sampler = local_sampler(model, eos_token_ids=[])
    assert isinstance(sampler, GenerateSampler)
    check(model, prompts, sampler.sample(prompts, max_new_tokens=8, temperature=1.0, seed=0), 1.0)


@pytest.mark.parametrize(
    ("engine", "on_cpu", "elsewhere"),
    [
        ("auto", GenerateSampler, ContinuousBatchingSampler),
        ("continuous_batching", ContinuousBatchingSampler, ContinuousBatchingSampler),
        ("generate", GenerateSampler, GenerateSampler),
    ],
)
def test_the_engine_that_is_asked_for(
    engine: Any, on_cpu: type, elsewhere: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = make_model(), SamplingConfig(engine=engine)
    assert isinstance(local_sampler(model, eos_token_ids=[], settings=settings), on_cpu)
    monkeypatch.setattr(local, "generate_is_quicker", lambda _: False)
    assert isinstance(local_sampler(model, eos_token_ids=[], settings=settings), elsewhere)


def test_a_setting_of_continuous_batching_is_never_ignored() -> None:
    settings = SamplingConfig(max_batch_tokens=64)
    assert isinstance(local_sampler(make_model(), eos_token_ids=[], settings=settings), ContinuousBatchingSampler)
    with pytest.raises(ConfigError, match=r"linear_attention.*leave max_batch_tokens out"):
        local_sampler(recurrent("mamba"), eos_token_ids=[], settings=settings)


@pytest.mark.parametrize(("count", "sizes"), [(24, [8, 8, 8]), (11, [5, 6]), (3, [3]), (0, [])])
def test_batches_are_of_one_size_and_of_similar_lengths(count: int, sizes: list[int]) -> None:
    prompts = make_prompts(count)
    batches = list(GenerateSampler(make_model(), max_requests=10)._batches(prompts))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(place for batch in batches for place in batch) == list(range(count))
    lengths = [len(prompts[place]) for batch in batches for place in batch]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("kind", RECURRENT)
def test_such_a_student_is_distilled(tmp_path: Path, kind: str) -> None:
    words = tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        model = recurrent(kind, vocab_size=len(words), bos_token_id=None, eos_token_id=0, seed=seed)
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "sums.jsonl", sums())
    for row in run(tmp_path / "run", tmp_path).metrics:
        assert row["sampler_mismatch/mean_abs"] < 1e-5
        assert row["teacher_kl"] > 0
        assert row["flops/student"] > row["flops/sampling"] > 0


def test_both_engines_draw_from_one_distribution() -> None:
    model, prompt = make_model(), [5, 9, 11]
    counts = []
    for kind in (ContinuousBatchingSampler, GenerateSampler):
        drawn = kind(model).sample([prompt] * 4000, max_new_tokens=2, temperature=1.0, seed=1)
        counts.append(torch.bincount(torch.tensor([done.token_ids[1] for done in drawn]), minlength=64) / 4000)
    assert (counts[0] - counts[1]).abs().max() < 0.03
