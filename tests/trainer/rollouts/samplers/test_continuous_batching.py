"""What continuous batching alone can get wrong: models it would sample wrongly from, and rounds of a few."""

import pytest
from sampler_cases import KINDS, check, make_model, make_prompts

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.samplers.continuous_batching import ContinuousBatchingSampler


def test_softcap_is_refused():
    with pytest.raises(ConfigError, match=r"attn_logit_softcapping 2.0.*set sampling.engine to generate"):
        ContinuousBatchingSampler(make_model("gemma2", attn_logit_softcapping=2.0))


def test_layers_without_attention_are_refused():
    with pytest.raises(
        ConfigError, match=r"Lfm2ForCausalLM has layers of the kind conv.*set sampling.engine to generate"
    ):
        ContinuousBatchingSampler(make_model("lfm2", layer_types=["conv", "full_attention"]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_where_prompts_are_read_in_pieces(kind, temperature):
    model, prompts = make_model(kind), make_prompts(20)
    sampler = ContinuousBatchingSampler(model, eos_token_ids=[2], max_requests=8, max_batch_tokens=64)
    completions = sampler.sample(prompts, max_new_tokens=16, temperature=temperature, seed=3)
    check(model, prompts, completions, temperature)


@pytest.mark.parametrize(("prompts", "limit", "at_once"), [(24, 10, 8), (24, 24, 24), (3, 10, 3), (11, 10, 6)])
def test_rounds_are_of_one_size(prompts, limit, at_once):
    sampler = ContinuousBatchingSampler(make_model(), max_requests=limit)
    assert sampler._batching_config(prompts, 20, 0).max_requests_per_batch == at_once
