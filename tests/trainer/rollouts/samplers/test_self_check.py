"""Models that an engine samples from wrongly, or not at all: what is chosen, what is said, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_models import odd_model
from sampler_cases import check, make_prompts

from fastkl.trainer.config.sampling import SamplingConfig
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.rollouts.samplers import local
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.rollouts.samplers.local import local_sampler

SERVED = ["llama", "gpt2", "opt", "granite", "qwen3_moe", "phimoe"]
LIES = ["gptj", "bloom", "openai-gpt", "rwkv"]
CRASHES = ["deepseek_v3", "falcon"]
READS_PADDING = ["rwkv", "minimax"]
FEW = ("gpt2", "gptj", "falcon")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` begins as it does there."""
    monkeypatch.setattr(local, "generate_is_quicker", lambda _: False)


def some(kinds: list[str], few: tuple[str, ...] = FEW) -> list[Any]:
    return [kind if kind in few else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def check_samples(model: Any, sampler: Any) -> None:
    prompts = make_prompts(9)
    check(model, prompts, sampler.sample(prompts, max_new_tokens=6, temperature=0.8, seed=0), 0.8)


@pytest.mark.parametrize("kind", some(SERVED))
def test_continuous_batching_where_it_is_right(
    kind: str, accelerator: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = odd_model(kind)
    sampler = local_sampler(model, eos_token_ids=[2])
    assert isinstance(sampler, ContinuousBatchingSampler)
    check_samples(model, sampler)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", some([*LIES, *CRASHES]))
def test_generate_where_continuous_batching_lies_or_crashes(
    kind: str, accelerator: None, capfd: pytest.CaptureFixture[str]
) -> None:
    model = odd_model(kind)
    sampler = local_sampler(model, eos_token_ids=[2])
    assert isinstance(sampler, GenerateSampler)
    check_samples(model, sampler)
    lines = capfd.readouterr().err.splitlines()
    said = f"it fails on {type(model).__name__} (" if kind in CRASHES else "its log-probs are "
    assert lines[0].startswith(f"fastkl: sampling by generate, not by continuous batching: {said}")
    assert len(lines) == 1 + (kind in READS_PADDING)  # no traceback of the engine's


@pytest.mark.parametrize("settings", [{"engine": "continuous_batching"}, {"max_batch_tokens": 64}], ids=str)
@pytest.mark.parametrize("kind", some(["gptj", "falcon", "bloom"]))
def test_continuous_batching_that_is_asked_for_is_refused(kind: str, settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"no continuous batching: it.*ForCausalLM.*set sampling.engine to generate"):
        local_sampler(odd_model(kind), eos_token_ids=[], settings=SamplingConfig(**settings))


@pytest.mark.parametrize(
    ("kind", "way", "batches"),
    [("minimax", "prompts of one length", 4), ("rwkv", "one prompt", 40)],  # rwkv mixes up the states of a batch
)
def test_smaller_batches_where_padding_is_read(
    kind: str, way: str, batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model, prompts = odd_model(kind), make_prompts(40, high=6)
    sampler: Any = local_sampler(model, eos_token_ids=[2])
    check(model, prompts[:9], sampler.sample(prompts[:9], max_new_tokens=6, temperature=0.8, seed=0), 0.8)
    assert f"sampling by generate in batches of {way}: in others its log-probs are" in capsys.readouterr().err
    found = list(sampler._batches(prompts))
    assert len(found) == batches
    assert sorted(place for places in found for place in places) == list(range(40))
    assert all(len({len(prompts[place]) for place in places}) == 1 for places in found)


@pytest.mark.parametrize("engine", ["generate", "continuous_batching"])
def test_the_check_is_cheap(engine: Any) -> None:
    """Models are large, and it is made at every start."""
    model, tokens = odd_model("llama"), []
    model.register_forward_pre_hook(lambda _, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True)
    local_sampler(model, eos_token_ids=[], settings=SamplingConfig(engine=engine))
    assert len(tokens) <= 10
    assert sum(tokens) <= 400


def test_a_model_that_cannot_be_sampled_from_is_refused() -> None:
    model = odd_model("llama")
    forward = model.forward
    model.forward = lambda **inputs: forward(**{**inputs, "past_key_values": None, "position_ids": None})
    with pytest.raises(ConfigError, match=r"no sampling by Transformers' generate: its log-probs are .* spread away"):
        local_sampler(model, eos_token_ids=[])


@pytest.mark.parametrize("engine", [ContinuousBatchingSampler, GenerateSampler])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_sentence(engine: Any, temperature: float) -> None:
    """After an update that broke the weights."""
    model = odd_model("llama")
    sampler = engine(model, eos_token_ids=[2])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(RunError, match="logits for token 1 of a completion are not finite"):
        sampler.sample([[5, 6, 7]], max_new_tokens=4, temperature=temperature, seed=0)


def test_both_engines_sample_where_the_config_asks_for_router_logits() -> None:
    model = odd_model("qwen3_moe")
    for kind in (GenerateSampler, ContinuousBatchingSampler):
        check_samples(model, kind(model, eos_token_ids=[2]))
