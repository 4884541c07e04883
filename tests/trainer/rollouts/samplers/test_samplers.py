"""Both samplers of this process: true log-probs, nothing leaking in, the same samples for a seed, the model as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampler_cases import ENGINES, KINDS, check, make_model, make_prompts, scores

RAISES = {"continuous_batching": RuntimeError, "generate": ZeroDivisionError}  # a thread's, and the caller's own


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def sampler_of(engine):
    return ENGINES[engine]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs(sampler_of, kind, temperature):
    model, prompts = make_model(kind), make_prompts(20)
    sampler = sampler_of(model, eos_token_ids=[2], max_requests=8)
    completions = sampler.sample(prompts, max_new_tokens=16, temperature=temperature, seed=3)
    check(model, prompts, completions, temperature)
    for done in completions:
        assert 2 not in done.token_ids[:-1]
        assert done.truncated == (done.token_ids[-1] != 2)


def test_eager_attention(sampler_of):
    model, prompts = make_model(attention="eager"), make_prompts(8)
    completions = sampler_of(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=0)
    check(model, prompts, completions, 1.0)
    assert model.config._attn_implementation == "eager"


def test_greedy_takes_the_likeliest(sampler_of):
    model, prompts = make_model(), make_prompts(12)
    completions = sampler_of(model).sample(prompts, max_new_tokens=8, temperature=0, seed=0)
    check(model, prompts, completions, 1.0)
    for prompt, done in zip(prompts, completions, strict=True):
        assert scores(model, prompt, done.token_ids).argmax(-1).tolist() == done.token_ids


def test_generation_config_does_not_leak(sampler_of):
    model, prompts = make_model(), make_prompts(24)
    plain = sampler_of(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=5)
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
    again = sampler_of(model).sample(prompts, max_new_tokens=8, temperature=1.0, seed=5)
    assert again == plain
    assert model.generation_config.to_dict() == before
    ranks = [
        (row > row[token]).sum().item()
        for p, c in zip(prompts, plain, strict=True)
        for row, token in zip(scores(model, p, c.token_ids), c.token_ids, strict=True)
    ]
    assert max(ranks) > 20  # far beyond top_k = 5


def test_distribution_of_the_first_token(sampler_of):
    model = make_model()
    prompt = [5, 9, 11]
    sampler = sampler_of(model)
    completions = sampler.sample([prompt] * 4000, max_new_tokens=1, temperature=0.7, seed=1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=64) / 4000
    expected = scores(model, prompt, [0], 0.7).exp()[0]
    assert (counts - expected).abs().max() < 0.03


def sampled(engine, seed):
    sampler = ENGINES[engine](make_model(), eos_token_ids=[2], max_requests=16)
    return sampler.sample(make_prompts(64), max_new_tokens=16, temperature=1.0, seed=seed)


def sampled_under_load():
    """Of each engine, while others want its cores."""
    spin = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"
    load = [subprocess.Popen([sys.executable, "-S", "-c", spin]) for _ in range(2)]
    try:
        return {engine: [c[:2] for c in sampled(engine, 1)] for engine in ENGINES}
    finally:
        for process in load:
            process.kill()


@pytest.fixture(scope="module")
def in_another_process():
    # Equal to the bit for equally many threads: they decide the order of sums.
    code = (
        f"import json, sys, torch; torch.set_num_threads({torch.get_num_threads()}); "
        f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; "
        "import test_samplers as t; print(json.dumps(t.sampled_under_load()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_determinism_in_and_across_processes(engine, in_another_process):
    first = sampled(engine, 1)
    torch.rand(7)
    assert sampled(engine, 1) == first
    assert sampled(engine, 2) != first
    assert in_another_process[engine] == [list(c[:2]) for c in first]


def test_caller_rng_is_untouched(sampler_of):
    model = make_model()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    sampler_of(model).sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_stops_at_any_eos_also_as_the_first_token(sampler_of):
    model, prompts = make_model(), make_prompts(30)
    greedy = sampler_of(model).sample(prompts, max_new_tokens=6, temperature=0, seed=0)
    eos = {greedy[0].token_ids[0], greedy[1].token_ids[2]}
    sampler = sampler_of(model, eos_token_ids=eos)
    completions = sampler.sample(prompts, max_new_tokens=6, temperature=0, seed=0)
    assert completions[0].token_ids == greedy[0].token_ids[:1]
    assert not completions[0].truncated
    for full, done in zip(greedy, completions, strict=True):
        stop = next((i for i, token in enumerate(full.token_ids) if token in eos), None)
        assert done.token_ids == full.token_ids[: None if stop is None else stop + 1]
        assert done.truncated == (stop is None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_state_and_training(sampler_of, checkpointing):
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
    sampler = sampler_of(model)
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


def test_peft(sampler_of):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    model.train()
    prompts = make_prompts(8)
    completions = sampler_of(model).sample(prompts, max_new_tokens=6, temperature=1.0, seed=0)
    assert model.training
    check(model, prompts, completions, 1.0)
    with model.disable_adapter(), pytest.raises(AssertionError):
        check(model, prompts, completions, 1.0)


def test_bad_arguments(sampler_of):
    model = make_model()
    sampler = sampler_of(model)
    assert sampler.sample([], max_new_tokens=4, temperature=1.0, seed=0) == []
    for bad in ([[]], [[64]], [[1] * 510]):
        with pytest.raises(ValueError, match="prompt 0"):
            sampler.sample(bad, max_new_tokens=4, temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        sampler.sample([[1]], max_new_tokens=0, temperature=1.0, seed=0)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            sampler.sample([[1]], max_new_tokens=1, temperature=bad, seed=0)


def test_an_error_in_the_model_is_the_callers_and_leaves_it_as_it_was(engine, sampler_of):
    model = make_model()
    sampler, own = sampler_of(model), model.generation_config
    model.train()

    def broken(*args, **kwargs):
        raise ZeroDivisionError("broken layer")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(RAISES[engine], match="broken layer"):
        sampler.sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config is own
    del model.model.layers[1].mlp.forward
    assert len(sampler.sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)) == 4


def test_quiet(sampler_of, capfd):
    sampler_of(make_model()).sample(make_prompts(4), max_new_tokens=4, temperature=1.0, seed=0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "ContinuousBatching" not in captured.err
    assert "generation" not in captured.err
