"""The fused head: the model's own log-probs and gradients, and the model as it was afterwards."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import causal_lm
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from fastkl._head.transform import LogitTransform, measure_logit_transform
from fastkl.head import fuse
from fastkl.loss import LossOutput, linear_cross_entropy, linear_logprobs

TEMPERATURE = 0.7

# What each family adds between the hidden states and the logits.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"kind": "llama", "tie_word_embeddings": False},
    "llama-tied": {"kind": "llama", "tie_word_embeddings": True},
    "smollm3": {"kind": "smollm3", "tie_word_embeddings": True},
    "qwen2": {"kind": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"kind": "qwen2", "tie_word_embeddings": False},
    "qwen3": {"kind": "qwen3", "tie_word_embeddings": True},
    "gemma2-softcap": {"kind": "gemma2", "attention": "eager", "final_logit_softcapping": 3.0},
    "gemma2-no-softcap": {"kind": "gemma2", "attention": "eager", "final_logit_softcapping": None},
    "gemma3-softcap": {"kind": "gemma3_text", "final_logit_softcapping": 5.0},
    "granite-scale": {"kind": "granite", "logits_scaling": 8.0, "tie_word_embeddings": True},
    "cohere-scale": {"kind": "cohere", "logit_scale": 0.0625},
    "phi-bias": {"kind": "phi", "tie_word_embeddings": False},
}
TRANSFORMS = {
    "gemma2-softcap": LogitTransform(1.0, 3.0),
    "gemma3-softcap": LogitTransform(1.0, 5.0),
    "granite-scale": LogitTransform(0.125, None),
    "cohere-scale": LogitTransform(0.0625, None),
}


def build(family: str) -> Any:
    model = causal_lm(**FAMILIES[family])  # type: ignore[arg-type]
    bias = model.get_output_embeddings().bias
    if bias is not None:  # initialised to 0, where leaving it out would go unnoticed
        nn.init.normal_(bias)
    return model.train()


def token_ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


def plain_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probs [2, 8] as everyone computes them: with all the logits."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = torch.log_softmax(logits.to(dtype) / TEMPERATURE, -1)
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1)


def fused_logprobs(model: nn.Module, ids: Tensor, **inputs: Any) -> Any:
    def logprobs(hidden: Tensor, weight: Tensor, **head: Any) -> Tensor:
        return linear_logprobs(hidden[:, :-1], weight, ids[:, 1:], temperature=TEMPERATURE, **head)

    return model(input_ids=ids, attention_mask=torch.ones_like(ids), fused=logprobs, **inputs)


def gradients(model: nn.Module, logprobs: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Values, and the gradient of a weighted sum of them by every parameter that is trained."""
    model.zero_grad(set_to_none=True)
    values = logprobs()
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).reshape(values.shape)
    (values * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return values.detach(), found


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


def change_logits(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """What the model does to its logits after the head, from here on."""
    plain_forward = model.forward

    def forward(**inputs: Any) -> Any:
        output = plain_forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = forward


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


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**(settings | options)))


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


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama", {"target_parameters": ["lm_head.weight"]}),
        ("llama-tied", {"trainable_token_indices": [5, 6]}),
    ],
    ids=["module", "parameter", "tied-tokens"],
)
@pytest.mark.parametrize("late", [False, True], ids=["", "fused-before"])
def test_an_adapter_on_the_head_is_refused_with_the_remedy(family: str, options: dict[str, Any], late: bool) -> None:
    model = build(family)
    adapted = lora(fuse(model) if late else model, **options)
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has an adapter .*target_modules.*trainable_token_indices"):
        fused_logprobs(adapted, token_ids()) if late else fuse(adapted)


def test_adalora_adds_to_a_loss_that_can_be_changed() -> None:
    peft = pytest.importorskip("peft")
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


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Quantised(nn.Linear):
    """As the integer layers of quantisation packages are: a subclass with packed weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight = nn.Parameter(self.weight.to(torch.int8), requires_grad=False)


def packed() -> nn.Linear:
    """As torchao's: a float32 dtype, and numbers that are elsewhere."""
    head = nn.Linear(64, 64)
    weight: Any = TwoTensor(head.weight.detach(), head.weight.detach())
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def forward_of_its_own() -> nn.Linear:
    head = nn.Linear(64, 64, bias=False)
    head.forward = lambda hidden: nn.functional.linear(hidden, head.weight.round(decimals=1))
    return head


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(64, 64)), Doubling(64, 64), Quantised(64, 64), packed()],
    ids=["sequence", "subclass-with-a-forward-of-its-own", "int8-weight", "packed-weight"],
)
def test_a_head_that_is_no_plain_linear_layer_is_refused(head: nn.Module) -> None:
    model = build("llama")
    model.lm_head = head
    with pytest.raises(TypeError, match=f"LlamaForCausalLM is {type(head).__name__}"):
        fuse(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_a_forward_that_is_not_linear_is_refused(dtype: torch.dtype) -> None:
    """As packages put it there that quantise on the fly."""
    model = build("llama")
    model.lm_head = forward_of_its_own()
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has a forward of its own \(forward_of_its_own"):
        fuse(model.to(dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z.square(),
        lambda z: -z,
        lambda z: z + 1,
        lambda z: z.clamp(-30, 30),
        lambda z: torch.tanh(z) + 0.1 * z,
    ],
    ids=["squared", "negated", "shifted", "clamped", "tanh-and-more"],
)
def test_unknown_treatment_of_the_logits_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = build("llama")
    change_logits(model, change)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*cannot be fused"):
        fuse(model)
    assert "forward" not in vars(model.lm_head)


def masked(value: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z.index_fill(-1, torch.tensor([40, 41, 63]), value)


BIAS = torch.zeros(1, 64).index_fill(1, torch.tensor([7]), 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: lora(model)], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (masked(-1e9), r"treats 3 ids .* apart.*logit of id 40 becomes -1e\+09 where -1e\+06 was expected"),
        (masked(-torch.inf), "logit of id 40 becomes -inf where -1e"),
        (masked(torch.nan), "logit of id 40 becomes nan where -1e"),
        (lambda z: z + BIAS, r"treats 1 ids .* apart.*logit of id 7 becomes -2.99 where -3 was expected"),
        (lambda z: z[..., :60], r"makes logits of shape \[9, 60\] of \[9, 64\] that its head gives"),
    ],
    ids=["padding-masked", "padding-forbidden", "padding-nan", "bias", "cut"],
)
def test_a_logit_that_depends_on_its_id_is_refused(
    change: Callable[[Tensor], Tensor], message: str, wrap: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    model = build("llama").to(dtype)
    change_logits(model, change)
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM.*{message}"):
        fuse(wrap(model))


def test_weights_that_are_not_finite_are_named() -> None:
    model = build("llama-tied")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"LlamaForCausalLM are not finite.*model.layers.1.mlp.up_proj.weight"):
        fuse(model)


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


@pytest.mark.parametrize("times", [0, 2])
def test_a_model_that_runs_its_head_another_number_of_times_is_an_error(times: int) -> None:
    model = build("llama")
    plain, calls = model.forward, [1]
    model.forward = lambda **inputs: [plain(**inputs) for _ in range(calls[0])][-1] if calls[0] else None
    fuse(model)
    calls[0] = times
    with pytest.raises(RuntimeError, match=f"LlamaForCausalLM ran its LM head {times} times"):
        model(input_ids=token_ids(), fused=lambda hidden, weight, **head: hidden.sum())


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
