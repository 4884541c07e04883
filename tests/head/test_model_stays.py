"""A fused model is the model that it was: its class, names, signature, copies, files, text and other people's hooks."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from composites import composite
from fused_training import lora
from tiny_models import causal_lm
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastkl._head.transform import measure_logit_transform
from fastkl.head import fuse
from fastkl.loss import LossOutput, policy_gradient_loss

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, Callable[[], Any]] = {
    "llama": causal_lm,
    "tied-softcap": lambda: causal_lm("gemma2", "eager", final_logit_softcapping=3.0),
    "lora": lambda: lora(causal_lm()),
    "trained-head": lambda: lora(causal_lm(), modules_to_save=["lm_head"]),
    "bfloat16": lambda: causal_lm().to(torch.bfloat16),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def objective(hidden: Tensor, weight: Tensor, **head: Any) -> LossOutput:
    return policy_gradient_loss(hidden[:, :-1], weight, IDS[:, 1:], torch.ones(2, 8), torch.zeros(2, 8), **head)


def loss(model: nn.Module) -> float:
    found: LossOutput = model(input_ids=IDS, fused=objective)
    return found.loss.item()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def forward_of(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).forward


@each_kind
def test_nothing_that_others_ask_for_is_different(kind: str) -> None:
    plain, model = KINDS[kind]().eval(), KINDS[kind]().eval()
    assert fuse(model) is model
    assert type(model) is type(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [*map(str, model.modules())] == [*map(str, plain.modules())]
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(forward_of(model)) == inspect.signature(forward_of(plain))
    assert forward_of(model).__code__ is forward_of(plain).__code__  # torch.export wants to know it
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, plain(input_ids=IDS, labels=IDS).loss)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **options), plain.generate(input_ids=IDS, **options))


@each_kind
def test_twice_is_once(kind: str) -> None:
    model = fuse(KINDS[kind]())
    forward = forward_of(model)
    assert forward_of(fuse(model)) is forward


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@each_kind
def test_a_copy_is_fused_and_its_own(kind: str, way: str) -> None:
    model = fuse(KINDS[kind]().eval())
    before = loss(model)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert loss(copied) == before
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.9)
    assert loss(copied) != before
    assert loss(model) == before


def test_the_folder_is_the_plain_models(tmp_path: Path) -> None:
    plain, model = causal_lm().eval(), fuse(causal_lm().eval())
    for name, each in (("plain", plain), ("fused", model)):
        each.save_pretrained(tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "fused").iterdir()}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused").eval()
    assert type(again) is LlamaForCausalLM
    assert loss(fuse(again)) == loss(model)


def test_an_adapters_folder(tmp_path: Path) -> None:
    from peft import PeftModel

    model = lora(fuse(causal_lm().eval()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(fuse(causal_lm().eval()), tmp_path)
    assert loss(again) == loss(model)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert loss(merged) == pytest.approx(loss(again), rel=1e-5)


class Counting(ModelHook):
    def __init__(self) -> None:
        self.outputs: list[type] = []

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.outputs.append(type(output))
        return output


@pytest.mark.parametrize("hooked_first", [False, True])
def test_hooks_of_accelerate(hooked_first: bool) -> None:
    """They replace a forward too; what they found is put back when they go."""
    model = causal_lm().eval()
    before, wanted = logits(model), loss(fuse(copy.deepcopy(model)))
    hook = Counting()
    steps: list[Callable[[], Any]] = [lambda: fuse(model), lambda: add_hook_to_module(model, hook)]
    for step in reversed(steps) if hooked_first else steps:
        step()
    hook.outputs.clear()
    assert torch.equal(logits(model), before)
    assert loss(model) == loss(fuse(model)) == wanted
    assert hook.outputs == [CausalLMOutputWithPast, LossOutput, LossOutput]
    assert inspect.signature(model.forward) == inspect.signature(LlamaForCausalLM.forward.__get__(model))
    remove_hook_from_module(model)
    assert torch.equal(logits(model), before)
    assert loss(model) == wanted


@pytest.mark.parametrize("fused_first", [False, True])
@pytest.mark.parametrize("head_too", [False, True])
def test_a_dispatched_model(head_too: bool, fused_first: bool) -> None:
    """Weights are brought where they are used, and taken away again; so are those of the head."""
    model = causal_lm().eval()
    wanted, scores = loss(fuse(copy.deepcopy(model))), logits(model)
    if fused_first:
        fuse(model)
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True))
    cpu_offload(model if head_too else model.model, execution_device=torch.device("cpu"))
    assert loss(fuse(model)) == wanted
    assert model.lm_head.weight.is_meta == head_too
    assert torch.equal(logits(model), scores)


@contextlib.contextmanager
def bf16() -> Iterator[Accelerator]:
    """An accelerator with mixed precision; its state, which a process has once, may be of another test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(cpu=True, mixed_precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", ["llama", "lora", "lora-fused-late"])
def test_mixed_precision_of_accelerate(kind: str) -> None:
    """Its wrapper runs the forward under autocast and gives results in float32; unwrapped, all is as before."""
    seen: list[bool] = []

    def function(hidden: Tensor, weight: Tensor, **head: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return {"hidden": hidden.bfloat16(), "output": objective(hidden, weight, **head), "said": "so"}

    model = KINDS[kind.removesuffix("-fused-late")]().eval()
    wanted = loss(fuse(copy.deepcopy(model)))
    with bf16() as accelerator:
        if "late" not in kind:
            fuse(model)
        prepared = fuse(accelerator.prepare(model))
        found = prepared(input_ids=IDS, fused=function)
        assert found["hidden"].dtype == found["output"].loss.dtype == torch.float32
        assert isinstance(found["output"], LossOutput)
        assert found["said"] == "so"
        assert seen == [True]
        assert float(found["output"].loss) == pytest.approx(wanted, rel=2e-2)
        assert torch.autograd.grad(found["output"].loss, [p for p in model.parameters() if p.requires_grad][-1:])
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert loss(unwrapped) == loss(copy.deepcopy(unwrapped)) == wanted
        assert logits(pickle.loads(pickle.dumps(unwrapped))).isfinite().all()


def test_mixed_precision_of_accelerate_comes_last() -> None:
    with bf16() as accelerator:
        model = accelerator.prepare(causal_lm())
        with pytest.raises(TypeError, match=r"has been prepared by accelerate.*prepare\(fuse\(model\)\)"):
            fuse(model)


def test_the_copies_of_data_parallel_have_their_own_forward() -> None:
    """What `nn.DataParallel` does with each of several devices."""
    model = fuse(causal_lm().eval())
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else 0.9 * parameter.detach())
    replica = copies[model]
    assert not torch.equal(logits(replica), logits(model))
    with pytest.raises(TypeError, match=r"nn\.DataParallel splits a batch.*torchrun"):
        loss(replica)
    assert loss(nn.DataParallel(model)) == loss(model)  # type: ignore[arg-type]


def test_a_forward_of_someone_elses_under_it() -> None:
    """As a bound method (Liger-Kernel's way) or as any function; copies have their own."""

    def patched(self: Any, *args: Any, **inputs: Any) -> Any:
        output = type(self).forward(self, *args, **inputs)
        output.logits = 2 * output.logits
        return output

    model = causal_lm().eval()
    before = logits(model)
    model.forward = patched.__get__(model)
    fuse(model)
    assert torch.equal(logits(model), 2 * before)
    assert model.forward.__func__.transform.logit_scale == 2.0
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert torch.equal(logits(copied), 0 * before)
    assert inspect.signature(model.forward) == inspect.signature(patched.__get__(model))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3_vl"])
def test_logits_to_keep(kind: str) -> None:
    model = fuse(causal_lm().eval() if kind == "llama" else composite(kind))
    wanted = model(input_ids=IDS, output_hidden_states=True).logits[:, -3:]
    found = model(input_ids=IDS, logits_to_keep=3, fused=lambda hidden, weight, **head: hidden @ weight.T)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_soft_cap_within_a_composite_config_is_changed_afterwards() -> None:
    model, found = composite("gemma3").eval(), []
    plain = model.forward

    def capped(**inputs: Any) -> Any:
        output, cap = plain(**inputs), model.config.text_config.final_logit_softcapping
        output.logits = output.logits if cap is None else cap * torch.tanh(output.logits / cap)
        return output

    model.forward = capped
    fuse(model)
    for cap in (None, 5.0):
        model.config.text_config.final_logit_softcapping = cap
        model(input_ids=IDS, fused=lambda hidden, weight, **head: found.append(head["softcap"]))
    assert found == [None, pytest.approx(5.0)]


def test_the_function_may_run_the_model() -> None:
    """As its own teacher, say: the head is its own again while the function runs."""
    model = fuse(lora(causal_lm().eval()))
    wanted = logits(model)
    with model.disable_adapter():
        base = logits(model)

    def both(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor, Any]:
        with model.disable_adapter():
            theirs = logits(model)
        return hidden @ weight.T, theirs, model(input_ids=IDS, fused=objective).loss

    ours, theirs, own = model(input_ids=IDS, fused=both)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(theirs, base)
    assert float(own) == loss(model)
    assert torch.equal(logits(model), wanted)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "gpt2", "qwen3_moe", "gemma3", "qwen3_vl"])
def test_a_model_whose_weights_come_later(kind: str) -> None:
    """On the meta device, as processes of FSDP load it that are not the first."""
    options: dict[str, dict[str, Any]] = {
        "gemma2": {"final_logit_softcapping": 3.0, "attention": "eager"},
        "granite": {"logits_scaling": 8.0},
    }
    model = composite(kind) if kind in ("gemma3", "qwen3_vl") else causal_lm(kind, **options.get(kind, {}))
    wanted = measure_logit_transform(model)
    weights = model.state_dict()
    empty = fuse(copy.deepcopy(model).to("meta"))
    assert empty.forward.__func__.transform == wanted
    empty.load_state_dict(weights, assign=True)
    for name, buffer in model.named_buffers():
        empty.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    assert loss(empty.eval()) == loss(fuse(model.eval()))


def test_a_model_without_weights_that_cannot_be_seen_through() -> None:
    model = causal_lm().to("meta")
    model.forward = lambda **_: model.model.layers[0].mlp(torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no weights yet.*load them before fuse"):
        fuse(model)


def test_an_encoder_and_a_decoder() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration has an encoder and a decoder"):
        fuse(T5ForConditionalGeneration(config))
