"""What is saved is what was trained: adapters merged into models of every kind, and folders that are not the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import refusal
from run_settings import config, training
from safetensors.torch import load_file
from tiny_models import causal_lm, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastkl.trainer.config.models import LoraConfig
from fastkl.trainer.errors import ConfigError, RunError
from fastkl.trainer.models import saving
from fastkl.trainer.models.adapters import adapted
from fastkl.trainer.models.text_path import text_path
from fastkl.trainer.runs.folder import RunFolder

IDS = torch.arange(3, 35).view(2, 16)
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Experts as stacks of matrices, that peft wraps twice and Transformers saves one by one; tied and untied heads.
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "olmoe": ("olmoe", EXPERTS),
    "mixtral": ("mixtral", EXPERTS),
}


def with_adapter(model: PreTrainedModel, **settings: Any) -> Any:
    """With LoRA layers that change something."""
    result: Any = adapted(model, LoraConfig(**{"rank": 2, **settings}), text_path(model, 64)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return result


@torch.no_grad()
def logprobs(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.log_softmax(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "settings"), FAMILIES.values(), ids=FAMILIES)
def test_a_merged_student_is_the_trained_one(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    plain = causal_lm(kind, **settings)
    keys, before = {name: tensor.shape for name, tensor in plain.state_dict().items()}, logprobs(plain)
    model = with_adapter(plain)
    trained = logprobs(model)
    assert (trained - before).abs().max() > 0.01
    saving.save_student(model, tokenizer(), tmp_path)
    torch.testing.assert_close(logprobs(model), trained, atol=1e-4, rtol=0)  # and goes on as it was
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == keys
    torch.testing.assert_close(logprobs(loaded), trained, atol=1e-4, rtol=0)

    from peft import PeftModel

    base = PeftModel.from_pretrained(causal_lm(kind, **settings), tmp_path / "adapter")
    torch.testing.assert_close(logprobs(base), trained, atol=1e-5, rtol=0)


def test_merging_keeps_dtypes(tmp_path: Path) -> None:
    saving.save_student(with_adapter(causal_lm().to(torch.bfloat16)), tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_an_adapter_on_a_tied_weight_is_refused(targets: list[str]) -> None:
    model = causal_lm(tie_word_embeddings=True)
    with pytest.raises(
        ConfigError, match=r"lora\.target_modules adapts .*, but its weight is also that of .*Leave it out"
    ):
        with_adapter(model, target_modules=targets)


def test_an_adapter_on_an_embedding_of_its_own(tmp_path: Path) -> None:
    model = with_adapter(causal_lm(), target_modules=["embed_tokens", "q_proj"])
    trained = logprobs(model)
    saving.save_student(model, tokenizer(), tmp_path)
    torch.testing.assert_close(logprobs(AutoModelForCausalLM.from_pretrained(tmp_path)), trained, atol=1e-4, rtol=0)


LOST = "model.layers.1.mlp.down_proj.weight"


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != LOST}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("layers.1.mlp", "layers.1.base_layer.mlp"): tensor for name, tensor in state.items()}


def transposed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.t() if name == LOST else tensor for name, tensor in state.items()}


DAMAGES = {"missing": without, "renamed": renamed, "transposed": transposed}


@pytest.mark.parametrize("shard", ["5GB", "50KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_weights_that_are_lost_are_named(
    damage: Any, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the files, not the state, lack them."""
    model = causal_lm()
    written: Any = type(model).save_pretrained

    def save(self: Any, folder: Path, state_dict: dict[str, Tensor]) -> None:
        written(self, folder, state_dict=damage(state_dict), max_shard_size=shard)

    monkeypatch.setattr(type(model), "save_pretrained", save)
    with pytest.raises(RunError, match=r"would not be the trained one: .*(layers\.1|does not load)"):
        saving.save_model(model, model.state_dict(), tmp_path)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_with_other_weights_is_refused(damage: Any, tmp_path: Path) -> None:
    model = causal_lm()
    with pytest.raises(RunError, match=r"would not be the trained one: .*(layers\.1|does not load)"):
        saving.save_model(model, damage(model.state_dict()), tmp_path)


def test_an_adapter_that_merges_into_something_else_ends_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoint and adapter are there, and the run can be finished once it merges."""
    from peft.tuners.lora import Linear

    wanted = Linear.get_delta_weight
    settings = training(tmp_path / "run", folder, optim__steps=1, optim__lr=0.3, student__lora__rank=2)
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "get_delta_weight", lambda self, adapter: -wanted(self, adapter))
        refusal(capsys, "sft", settings, "would not be the trained one", "merging the adapter changes the log-probs")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-000001"}
    assert (tmp_path / "run/student.incomplete/adapter/adapter_model.safetensors").is_file()
    assert not (tmp_path / "run/student").exists()


def put(text: str) -> Callable[[Path], None]:
    def write(aside: Path) -> None:
        aside.mkdir()
        (aside / "config.json").write_text(text)

    return write


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("killed", ["", "before-the-new-one", "before-the-rest"])
def test_a_student_is_replaced_at_once(killed: str, folder: Path, tmp_path: Path) -> None:
    """Whatever else somebody put beside it stays."""
    with RunFolder(config("sft", training(tmp_path / "run", folder))) as run:
        run.save_student(put("first"))
        (run.student / "notes.txt").write_text("mine")
        if killed:
            run.student.rename(run.path / "student.old")
        if killed == "before-the-rest":
            put("second")(run.student)
        run.save_student(put("last"))
        assert content(run.student) == {"config.json": "last", "notes.txt": "mine"}
        assert not [path for path in run.path.iterdir() if path.name.startswith("student.")]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RunError("other weights")], ids=["disk", "weights"]
)
def test_a_student_that_is_not_whole_replaces_none(error: Exception, folder: Path, tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        put("half")(aside)
        raise error

    with RunFolder(config("sft", training(tmp_path / "run", folder))) as run:
        run.save_student(put("first"))
        with pytest.raises(RunError, match=r"No space left|other weights"):
            run.save_student(fail)
        assert content(run.student) == {"config.json": "first"}
        assert (run.path / "student.incomplete").exists() == isinstance(error, RunError)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def test_what_a_server_loads_names_a_tied_head_too(kind: str, tied: bool, tmp_path: Path) -> None:
    settings = EXPERTS if kind == "qwen3_moe" else {}
    model: Any = causal_lm(kind, tie_word_embeddings=tied, **settings)
    saving.save_weights(model, tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
