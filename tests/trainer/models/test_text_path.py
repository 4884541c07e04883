"""What text does not reach is frozen and not adapted; layers that cannot be adapted are left out, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composites import COMPOSITES, composite
from tiny_models import causal_lm
from torch import nn
from transformers import PreTrainedModel

from fastkl.trainer.config.models import LoraConfig, StudentConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models import loading
from fastkl.trainer.models.adapters import adapted
from fastkl.trainer.models.text_path import freeze_unreached, text_path

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
COMPOSITE = pytest.mark.parametrize(("kind", "frozen"), [(kind, frozen) for kind, (_, frozen) in COMPOSITES.items()])


def without_gradient(model: nn.Module) -> list[str]:
    """What is trained and gets no gradient from a text."""
    model.train()(input_ids=torch.arange(3, 35).view(2, 16), use_cache=False).logits.logsumexp(-1).sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def with_adapter(model: PreTrainedModel, targets: str | list[str] = "all-linear") -> Any:
    path = text_path(model, 64)
    freeze_unreached(model, path)
    return adapted(model, LoraConfig(rank=2, target_modules=targets), path)


def layers(model: nn.Module) -> set[str]:
    """The layers that have an adapter, under their last names."""
    return {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}


@COMPOSITE
def test_what_text_does_not_reach_is_frozen(kind: str, frozen: list[str]) -> None:
    model = composite(kind)
    random = torch.get_rng_state()
    assert freeze_unreached(model, text_path(model, 64)) == frozen
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert without_gradient(model) == []
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if not n.startswith(tuple(f"{name}." for name in frozen))}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
@COMPOSITE
def test_adapters_go_where_text_does(kind: str, frozen: list[str], targets: str | list[str]) -> None:
    model = with_adapter(composite(kind), targets)
    assert without_gradient(model) == []
    places = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert places
    assert not [name for name in places for part in frozen if f".{part}." in name]


def test_a_composite_student_is_loaded_and_saved_whole(tmp_path: Any) -> None:
    from fastkl.trainer.models.saving import save_model

    model = composite("mistral3")
    model.save_pretrained(tmp_path / "model")
    student = loading.load_student(StudentConfig(str(tmp_path / "model")), torch.device("cpu"))
    assert type(student) is type(model)
    save_model(student, student.state_dict(), tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "again")]
    assert files[0] == files[1]


def test_a_model_that_needs_an_image_is_refused() -> None:
    model = causal_lm()
    model.forward = lambda **_: model.no_images  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not read text alone \(.*no_images.*\); take another"):
        text_path(model, 64)


class Experts(nn.Module):
    """A mixture that sends everything to its first expert, and a part that nothing is sent to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([inner, type(inner)(inner.config)])  # type: ignore[call-arg, arg-type]
        self.bias, self.other = nn.Parameter(torch.zeros(3)), nn.Linear(2, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.experts[0](hidden)  # type: ignore[no-any-return]


def test_experts_that_no_token_was_for_are_trained() -> None:
    model: Any = causal_lm()
    model.model.layers[1].mlp = Experts(model.model.layers[1].mlp)
    frozen = freeze_unreached(model, text_path(model, 64))
    assert frozen == ["model.layers.1.mlp.bias", "model.layers.1.mlp.other"]
    result = with_adapter(model)
    assert any("experts.1.down_proj.lora_A" in name for name, _ in result.named_parameters())
    assert not any(".other.lora" in name for name, _ in result.named_parameters())


def test_layers_that_need_a_longer_text_are_trained() -> None:
    """DeepSeek-V4 compresses keys 128 positions back."""
    sizes = {"q_lora_rank": 16, "head_dim": 16, "qk_rope_head_dim": 16, "index_n_heads": 4, "index_head_dim": 16}
    kinds = ["heavily_compressed_attention", "compressed_sparse_attention"]
    model = causal_lm("deepseek_v4", "eager", layer_types=kinds, n_routed_experts=4, index_topk=16, **sizes, **EXPERTS)
    frozen = freeze_unreached(model, text_path(model, None))
    assert [name for name in frozen if "indexer" not in name and "bias" not in name] == []


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MAMBA = {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 8, "num_attention_heads": 8}
LEFT_OUT: dict[str, tuple[str, dict[str, object], str, set[str]]] = {
    "phimoe": ("phimoe", EXPERTS, "router", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "mamba": ("mamba", {"state_size": 8}, "out_proj", {"in_proj"}),
    "mamba2": ("mamba2", MAMBA, "out_proj", {"in_proj"}),
}


@pytest.mark.parametrize(("kind", "settings", "out", "rest"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_layers_that_cannot_be_adapted(kind: str, settings: dict[str, object], out: str, rest: set[str]) -> None:
    found = layers(with_adapter(causal_lm(kind, "eager", **settings)))
    assert rest <= found
    assert out not in found
    with pytest.raises(ConfigError, match=rf"target_modules adapts .*\.{out}, but .*Leave it out"):
        with_adapter(causal_lm(kind, "eager", **settings), [out])


WRONG: dict[str, tuple[str | list[str], str]] = {
    "none": (
        ["nosuch"],
        "has 'nosuch', which names no layer of LlamaForCausalLM; give all-linear, or some of down_proj",
    ),
    "one-of-two": (["q_proj", "vproj"], "has 'vproj', which names no layer"),
    "expression": (r".*\.nosuch", "which names no layer"),
    "no-expression": ("*q", "neither all-linear nor a regular expression"),
    "no-linear-layer": (["norm"], "Target module .* is not supported"),
}


@pytest.mark.parametrize(("targets", "message"), WRONG.values(), ids=WRONG)
def test_targets_that_are_no_layers(targets: str | list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"student.lora.target_modules .*{message}") as error:
        with_adapter(causal_lm(), targets)
    assert len(str(error.value)) < 300


def test_an_expression_names_layers() -> None:
    assert layers(with_adapter(causal_lm(), r".*\.1\.self_attn\.[qv]_proj")) == {"q_proj", "v_proj"}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_an_expression_that_matches_blocks_means_their_layers(kind: str) -> None:
    block, parts = (".*attn.*", {"c_attn", "c_proj"}) if kind == "gpt2" else (".*self_attn.*", ATTENTION)
    assert layers(with_adapter(causal_lm(kind), block)) == parts


def test_experts_by_the_names_they_had() -> None:
    """peft knows them: they are parameters now, not layers."""
    named = with_adapter(causal_lm("qwen3_moe", **EXPERTS), ["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert layers(named) >= {"q_proj", "experts"}


@pytest.mark.parametrize("kind", ["jetmoe", "ctrl", "openai-gpt"])
def test_no_checkpointing(kind: str, tmp_path: Any) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "dff": 96, "kv_channels": 16, **EXPERTS}
    causal_lm(kind, "eager", **sizes).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"student.gradient_checkpointing is true, which \w+ does not support; set it to"
    ):
        loading.load_student(StudentConfig(str(tmp_path), gradient_checkpointing=True), torch.device("cpu"))


def test_rwkv_does_not_change_its_weights(tmp_path: Any) -> None:
    causal_lm("rwkv", "eager", attention_hidden_size=64, rescale_every=1).save_pretrained(tmp_path)
    student = loading.load_student(StudentConfig(str(tmp_path)), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with torch.no_grad():
        student.eval()(input_ids=torch.arange(3, 9)[None])
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
