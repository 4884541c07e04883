"""The fused head: the model's own log-probs and gradients, and the model as it was afterwards."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fused_training import lora
from head_cases import (
    FAMILIES,
    TEMPERATURE,
    build,
    change_logits,
    fused_logprobs,
    gradients,
    plain_logprobs,
    token_ids,
)
from tiny_models import causal_lm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fastkl._head.transform import LogitTransform, measure_logit_transform
from fastkl.head import fuse
from fastkl.loss import LossOutput, linear_cross_entropy, linear_logprobs

TRANSFORMS = {
    "gemma2-softcap": LogitTransform(1.0, 3.0),
    "gemma3-softcap": LogitTransform(1.0, 5.0),
    "granite-scale": LogitTransform(0.125, None),
    "cohere-scale": LogitTransform(0.0625, None),
}


def check_same(model: nn.Module) -> None:
    """Fused and plain agree on one model, in values and in the set and the values of gradients."""
    ids = token_ids()
    values, wanted = gradients(model, lambda: plain_logprobs(model, ids))
    fuse(model)
    fused_values, found = gradients(model, lambda: fused_logprobs(model, ids))
    torch.testing.assert_close(fused_values, values, atol=2e-5, rtol=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # relative to the tensor: its entries are sums over the vocabulary in another order
        error, scale = (found[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 2e-5 * scale + 1e-6, f"{name}: off by {error} at a scale of {scale}"


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_unfused_model(family: str) -> None:
    check_same(build(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errs_no_more_than_the_unfused_model(family: str) -> None:
    """Against the truth (the same bfloat16 weights in float64), by root mean square over each tensor."""
    exact, ids = build(family).to(torch.bfloat16), token_ids()
    model = copy.deepcopy(exact)
    exact.double()
    truth, true_gradients = gradients(exact, lambda: plain_logprobs(exact, ids))
    values, plain = gradients(model, lambda: plain_logprobs(model, ids))
    fuse(model)
    fused_values, found = gradients(model, lambda: fused_logprobs(model, ids))

    def rms(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().mean().sqrt())

    assert fused_values.dtype == torch.float32
    assert rms(fused_values, truth) <= 1.5 * rms(values, truth) + 1e-3
    for name, gradient in true_gradients.items():
        ours, theirs = rms(found[name], gradient), rms(plain[name], gradient)
        floor = 2**-9 * float(gradient.square().mean().sqrt())  # half a unit in the last place of bfloat16
        assert ours <= 1.5 * theirs + floor, f"{name}: {ours} against {theirs} of the unfused model"


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_transform(family: str) -> None:
    transform = measure_logit_transform(build(family))
    wanted = TRANSFORMS.get(family, LogitTransform(1.0, None))
    assert transform.logit_scale == pytest.approx(wanted.logit_scale, rel=1e-6)
    assert transform.softcap == (None if wanted.softcap is None else pytest.approx(wanted.softcap, rel=1e-6))


@pytest.mark.parametrize(
    ("scale", "cap"), [(0.1, 30.0), (3.0, 30.0), (1.0, 0.5), (1.0, 1000.0), (1e-3, None), (50.0, None)]
)
def test_measured_transform_of_any_scale_and_cap(scale: float, cap: float | None) -> None:
    model = causal_lm()
    change_logits(model, lambda z: scale * z if cap is None else cap * torch.tanh(scale * z / cap))
    transform = measure_logit_transform(model)
    assert transform.logit_scale == pytest.approx(scale, rel=1e-3)
    assert transform.softcap == (None if cap is None else pytest.approx(cap, rel=1e-3))
    check_same(model)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("gemma2-softcap", "final_logit_softcapping", 30.0),
        ("gemma2-softcap", "final_logit_softcapping", None),
        ("gemma2-no-softcap", "final_logit_softcapping", 3.0),
        ("granite-scale", "logits_scaling", 2),
    ],
)
def test_a_setting_of_the_logits_that_is_changed_afterwards(family: str, name: str, value: float | None) -> None:
    model = fuse(build(family))
    before = fused_logprobs(model, token_ids()).detach()
    setattr(model.config, name, value)
    check_same(model)
    assert not torch.allclose(before, fused_logprobs(model, token_ids()))


def test_no_random_number_is_drawn_and_no_mode_is_changed() -> None:
    """Training with dropout goes on as if the model had not been fused."""
    model = causal_lm("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def test_gradient_checkpointing_equals_without() -> None:
    model = build("qwen3")
    ids, fused = token_ids(), fuse(model)
    values, wanted = gradients(model, lambda: fused_logprobs(fused, ids))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, found = gradients(model, lambda: fused_logprobs(fused, ids))
    assert torch.equal(values, again)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient-checkpointing"])
def test_lora_adapters_get_the_unfused_gradients(checkpointing: bool) -> None:
    model = build("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    check_same(lora(model))


def test_lora_all_linear_leaves_the_head_out() -> None:
    check_same(lora(build("llama"), target_modules="all-linear"))


def test_head_in_modules_to_save_is_trained_in_full() -> None:
    model = lora(build("llama"), modules_to_save=["lm_head"])
    check_same(model)
    _, found = gradients(model, lambda: fused_logprobs(fuse(model), token_ids()))
    assert any("lm_head.modules_to_save" in name for name in found)


def test_head_in_modules_to_save_with_the_adapter_off() -> None:
    """The base model speaks with its own head then, not with the trained copy."""
    model, ids = lora(build("llama"), modules_to_save=["lm_head"]), token_ids()
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
        fused = fuse(model)
        on = fused_logprobs(fused, ids)
        with model.disable_adapter():
            off = fused_logprobs(fused, ids)
            torch.testing.assert_close(off, plain_logprobs(model, ids), atol=2e-5, rtol=1e-5)
        assert not torch.allclose(on, off)


def test_adalora_adds_to_a_loss_that_can_be_changed() -> None:
    settings = {"target_modules": ["q_proj"], "init_r": 4, "target_r": 2, "total_step": 10, "task_type": "CAUSAL_LM"}
    model, ids = peft.get_peft_model(fuse(build("llama")), peft.AdaLoraConfig(**settings)), token_ids()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)

    def output(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
        return linear_cross_entropy(hidden[:, :-1], weight, ids[:, 1:], **head)

    wanted = model(input_ids=ids, labels=ids).loss
    found = model(input_ids=ids, fused=lambda *args, **head: CausalLMOutput(loss=output(*args, **head).loss)).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError, match=r"AdaLora.*CausalLMOutput\(loss=output\.loss\)"):
        model(input_ids=ids, fused=output)


def test_the_model_is_as_before_afterwards() -> None:
    model, ids = build("llama"), token_ids()
    before = plain_logprobs(model, ids)
    fuse(model)
    modules = [(name, type(module), set(vars(module))) for name, module in model.named_modules()]
    gradients(model, lambda: fused_logprobs(model, ids))
    assert [(name, type(module), set(vars(module))) for name, module in model.named_modules()] == modules
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(plain_logprobs(model, ids), before)


def test_an_exception_in_the_function_leaves_the_head_restored() -> None:
    model, ids = build("llama"), token_ids()
    before = plain_logprobs(fuse(model), ids)

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("in the loss")

    with pytest.raises(ZeroDivisionError, match="in the loss"):
        model(input_ids=ids, fused=broken)
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(plain_logprobs(model, ids), before)


def test_a_forward_that_someone_else_put_on_the_head_is_put_back() -> None:
    model, ids = build("llama"), token_ids()
    own = model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    fused_logprobs(fuse(model), ids)
    assert model.lm_head.forward is own


def test_hooks_on_the_head_fire_and_see_the_hidden_states() -> None:
    """DDP, FSDP2, ZeRO-3 and peft gather, cast and release weights in these hooks."""
    model, ids, seen = build("llama"), token_ids(), []
    fused = fuse(model)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(("before", inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(("after", output.shape)))
    fused_logprobs(fused, ids)
    assert seen == [("before", (2, 9, 64)), ("after", (2, 9, 0))]


def test_one_inside_another() -> None:
    """A teacher may be run from within the student's function; each has its own head back afterwards."""
    outer, inner, ids = build("llama"), build("qwen2"), token_ids()
    fused_outer, fused_inner = fuse(outer), fuse(inner)
    alone = fused_logprobs(fused_outer, ids), fused_logprobs(fused_inner, ids)

    def both(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        scores = linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], temperature=TEMPERATURE, **head)
        return scores, fused_logprobs(fused_inner, ids)

    together = fused_outer(input_ids=ids, attention_mask=torch.ones_like(ids), fused=both)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert "forward" not in vars(outer.lm_head)
    assert "forward" not in vars(inner.lm_head)


def test_saved_model_loads_without_fastkl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("gemma2-softcap"), token_ids()
    gradients(model, lambda: fused_logprobs(fuse(model), ids))
    with torch.no_grad():  # as a training step would have
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    model.eval().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "fastkl", None)  # any import of it fails
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
