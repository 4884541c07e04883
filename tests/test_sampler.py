"""Continuous batching: true log-probs, nothing leaking in, the same samples for a seed, the model left as it was."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import causal_lm

from fastkl.trainer.samplers.continuous_batching import ContinuousBatchingSampler

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "granite", "mistral"]


def make_model(kind="llama", attention="sdpa", **settings):
    if kind == "gemma2":  # its soft cap is not applied by paged attention; 5.23 has only eager for it
        settings, attention = {"attn_logit_softcapping": None, **settings}, "eager"
    return causal_lm(kind, attention, **settings)


def make_prompts(count, low=3, high=40, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(3, 64) for _ in range(rng.randint(low, high))] for _ in range(count)]


def scores(model, prompt, tokens, temperature=1.0):
    """Log-probabilities of all tokens at each completion position, from one ordinary forward pass."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    model.train(training)
    return torch.log_softmax(logits / temperature, -1)


def check(model, prompts, completions, temperature):
    for prompt, done in zip(prompts, completions, strict=True):
        expected = scores(model, prompt, done.token_ids, temperature)
        expected = expected.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs(kind, temperature):
    model, prompts = make_model(kind), make_prompts(20)
    sampler = ContinuousBatchingSampler(model, eos_token_ids=[2], max_requests=8, max_batch_tokens=64)
    completions = sampler.sample(prompts, max_new_tokens=16, temperature=temperature, seed=3)
    check(model, prompts, completions, temperature)
    for done in completions:
        assert 2 not in done.token_ids[:-1]
        assert done.truncated == (done.token_ids[-1] != 2)


def test_eager_attention():
    model, prompts = make_model(attention="eager"), make_prompts(8)
    completions = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=0)
    check(model, prompts, completions, 1.0)
    assert model.config._attn_implementation == "eager"


def test_softcap_is_refused():
    with pytest.raises(ValueError, match="softcapping"):
        ContinuousBatchingSampler(make_model("gemma2", attn_logit_softcapping=2.0))


def test_greedy_takes_the_likeliest():
    model, prompts = make_model(), make_prompts(12)
    completions = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=8, temperature=0, seed=0)
    check(model, prompts, completions, 1.0)
    for prompt, done in zip(prompts, completions, strict=True):
        assert scores(model, prompt, done.token_ids).argmax(-1).tolist() == done.token_ids


def test_generation_config_does_not_leak():
    model, prompts = make_model(), make_prompts(24)
    plain = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=5)
    model.generation_config.update(
        do_sample=True,
        top_p=0.5,
        top_k=5,
        repetition_penalty=1.3,
        temperature=0.2,
        min_length=50,
        min_new_tokens=50,
        num_return_sequences=2,
        max_new_tokens=2,
        eos_token_id=list(range(3, 40)),
    )
    before = model.generation_config.to_dict()
    again = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=5)
    assert again == plain
    assert model.generation_config.to_dict() == before
    ranks = [
        (row > row[token]).sum().item()
        for p, c in zip(prompts, plain, strict=True)
        for row, token in zip(scores(model, p, c.token_ids), c.token_ids, strict=True)
    ]
    assert max(ranks) > 20  # far beyond top_k = 5


def test_distribution_of_the_first_token():
    model = make_model()
    prompt = [5, 9, 11]
    sampler = ContinuousBatchingSampler(model)
    completions = sampler.sample([prompt] * 4000, max_new_tokens=1, temperature=0.7, seed=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=64) / 4000
    expected = scores(model, prompt, [0], 0.7).exp()[0]
    assert (counts - expected).abs().max() < 0.03


def sampled(seed):
    sampler = ContinuousBatchingSampler(make_model(), eos_token_ids=[2], max_requests=16)
    return sampler.sample(make_prompts(64), max_new_tokens=16, temperature=1.0, seed=seed)


def test_determinism_in_and_across_processes():
    first = sampled(1)
    torch.rand(7)
    assert sampled(1) == first
    assert sampled(2) != first
    # Equal to the bit for equally many threads: they decide the order of sums.
    code = (
        f"import json, torch; torch.set_num_threads({torch.get_num_threads()}); "
        "import test_sampler as t; print(json.dumps([c[:2] for c in t.sampled(1)]))"
    )
    spin = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    load = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(2)]
    try:
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    finally:
        for process in load:
            process.kill()
    assert json.loads(run.stdout.splitlines()[-1]) == [list(c[:2]) for c in first]


def test_caller_rng_is_untouched():
    model = make_model()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    ContinuousBatchingSampler(model).sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_stops_at_any_eos_also_as_the_first_token():
    model, prompts = make_model(), make_prompts(30)
    greedy = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=6, temperature=0, seed=0)
    eos = {greedy[0].token_ids[0], greedy[1].token_ids[2]}
    sampler = ContinuousBatchingSampler(model, eos_token_ids=eos)
    completions = sampler.sample(prompts, max_new_tokens=6, temperature=0, seed=0)
    assert completions[0].token_ids == greedy[0].token_ids[:1]
    assert not completions[0].truncated
    for full, done in zip(greedy, completions, strict=True):
        stop = next((i for i, token in enumerate(full.token_ids) if token in eos), None)
        assert done.token_ids == full.token_ids[: None if stop is None else stop + 1]
        assert done.truncated == (stop is None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_state_and_training(checkpointing):
    model, ids = make_model(), torch.tensor([make_prompts(1, 30, 30)[0]])
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]

    def gradients():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return [output.logits.detach()] + [p.grad.clone() for p in model.parameters()]

    before = gradients()
    sampler = ContinuousBatchingSampler(model)
    sampler.sample(make_prompts(8), max_new_tokens=4, temperature=1.0, seed=0)
    assert [m.training for m in model.modules()] == flags
    assert model.config._attn_implementation == "sdpa"
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    completions = sampler.sample(make_prompts(8), max_new_tokens=4, temperature=1.0, seed=0)
    check(model, make_prompts(8), completions, 1.0)  # sampled with the new weights


def test_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    model.train()
    prompts = make_prompts(8)
    completions = ContinuousBatchingSampler(model).sample(prompts, max_new_tokens=6, temperature=1.0, seed=0)
    assert model.training
    check(model, prompts, completions, 1.0)
    with model.disable_adapter(), pytest.raises(AssertionError):
        check(model, prompts, completions, 1.0)


def test_errors():
    model = make_model()
    sampler = ContinuousBatchingSampler(model)
    assert sampler.sample([], max_new_tokens=4, temperature=1.0, seed=0) == []
    for bad in ([[]], [[64]], [[1] * 510]):
        with pytest.raises(ValueError, match="prompt 0"):
            sampler.sample(bad, max_new_tokens=4, temperature=1.0, seed=0)
    model.train()

    def broken(*args, **kwargs):
        raise ZeroDivisionError("broken layer")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(RuntimeError, match="broken layer"):
        sampler.sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    del model.model.layers[1].mlp.forward
    assert len(sampler.sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)) == 4


def test_quiet(capfd):
    ContinuousBatchingSampler(make_model()).sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "ContinuousBatching" not in captured.err


@pytest.mark.parametrize(("prompts", "limit", "at_once"), [(24, 10, 8), (24, 24, 24), (3, 10, 3), (11, 10, 6)])
def test_rounds_are_of_one_size(prompts, limit, at_once):
    sampler = ContinuousBatchingSampler(make_model(), max_requests=limit)
    assert sampler._batching_config(prompts, 20, 0).max_requests_per_batch == at_once
