"""Model folders that are damaged, or of a kind that cannot be used: one short sentence, and nothing is run or written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import refusal
from run_settings import MINIMAL, config
from safetensors.torch import load_file, save_file
from tiny_data import sums, write_jsonl
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from fastkl.trainer.config.models import StudentConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.loading import load_student
from fastkl.trainer.models.pretrained import load_tokenizer
from fastkl.trainer.runs.start import start_run

WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
Damage = Callable[[Path], object]


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def cut_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])


def holds(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop("model.layers.0.mlp.down_proj.weight")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def without_a_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    (folder / "model-00002-of-00005.safetensors").unlink()


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def harmful(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Harm()}, folder / "pytorch_model.bin")


def configured(**values: object) -> Damage:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return change


MODELS: dict[str, tuple[Damage, str]] = {
    "cut-short": (cut, "SafetensorError: Error while deserializing header"),
    "cut-short-bin": (cut_bin, "Is every file of it whole?"),
    "empty": (holds(WEIGHTS, ""), "Is every file of it whole?"),
    "a-web-page": (holds(WEIGHTS, "<html>404"), "Is every file of it whole?"),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), "no file named model.safetensors"),
    "no-shard": (without_a_shard, "model-00002-of-00005.safetensors"),
    "a-weight-less": (
        without_a_weight,
        "lack 1 weights of LlamaForCausalLM or have them in another shape (model.layers.0.mlp",
    ),
    "other-shapes": (configured(intermediate_size=40), "lack 3 weights of LlamaForCausalLM"),
    "harmful": (harmful, "UnpicklingError"),
    "no-json": (holds(CONFIG, "{"), "not a valid JSON file"),
    "a-list": (holds(CONFIG, "[1]"), "Should have a `model_type` key in its config.json"),
    "wrong-type": (configured(hidden_size="big"), "'hidden_size' expected int, got str"),
    "negative": (configured(hidden_size=-4), "negative dimension -4"),
    "heads": (configured(num_attention_heads=3), "not a multiple of the number of attention heads (3)"),
    "activation": (configured(hidden_act="nosuch"), "KeyError: 'nosuch'. Is every file of it whole?"),
    "unknown-family": (configured(model_type="llama9"), "has model type `llama9` but Transformers does not"),
    "own-code": (
        configured(model_type="ours", auto_map={"AutoConfig": "ours.Config", "AutoModelForCausalLM": "ours.Model"}),
        "student.trust_remote_code",
    ),
    "no-language-model": (configured(model_type="t5"), "t5 is no causal language model of Transformers"),
}
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "empty-object": (holds("tokenizer.json", "{}"), "Is every file of it whole?"),
    "no-json": (holds("tokenizer.json", "{"), "Is every file of it whole?"),
    "no-json-config": (holds("tokenizer_config.json", "["), "Is every file of it whole?"),
}
DAMAGES = MODELS | {f"tokenizer-{name}": case for name, case in TOKENIZERS.items()}
READERS: dict[str, dict[str, object]] = {
    "sft": {"student.path": "bad"},
    "distill": {"student.path": "s", "teacher.path": "bad", "sampling.max_new_tokens": 4},
    "eval": {"model.path": "bad", "eval.max_new_tokens": 4},
    "score": {"model.path": "bad"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(Path("s"))
    save_model(Path("bad"))
    write_jsonl(Path("d.jsonl"), sums(3))
    return tmp_path


def read(folder: Path, **settings: Any) -> str:
    """What reading a folder's student is refused with."""
    config = StudentConfig(str(folder), **settings)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(config), load_student(config, torch.device("cpu"))
    said = str(error.value)
    assert len(said) < 400
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("damage", "part"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder(damage: Damage, part: str, here: Path) -> None:
    damage(here / "bad")
    said = read(here / "bad")
    assert f"could be loaded from '{here}/bad': " in said
    assert part in said
    assert not Path("harmed").exists()


def with_a_weight(folder: Path, name: str) -> None:
    weights = load_file(folder / WEIGHTS) | {name: torch.zeros(2)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_weight_without_a_place_in_the_model(name: str, here: Path) -> None:
    with_a_weight(here / "bad", name)
    assert f"holds 1 weights that LlamaForCausalLM has no place for by its config.json ({name})" in read(here / "bad")


@pytest.mark.parametrize("name", ["v_head.weight", "model.layers.0.self_attn.bias"])
def test_a_weight_of_something_else(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_a_weight(here / "s", name)
    load_student(StudentConfig(str(here / "s")), torch.device("cpu"))
    assert f"are left out ({name})" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["<eos>", [1, "<eos>"], {"id": 1}, 1.0, -1, True, 10_000, [1, None]], ids=str)
def test_an_end_that_is_no_id(value: object, here: Path) -> None:
    (here / "bad" / GENERATION).write_text(json.dumps({"eos_token_id": value}))
    said = read(here / "bad")
    assert f"{GENERATION} has eos_token_id {json.dumps(value)}, but " in said
    assert "write a token's id, a list of ids, or null" in said


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_generation_config_that_is_no_object(text: str, here: Path) -> None:
    (here / "bad" / GENERATION).write_text(text)
    assert GENERATION in (said := read(here / "bad"))
    assert said.endswith("download it again, or delete it")


@pytest.mark.parametrize("text", ["{}", '{"eos_token_id": null}', '{"eos_token_id": [0, 1]}', '{"eos_token_id": 1}'])
def test_a_generation_config_that_can_be_used(text: str, here: Path) -> None:
    (here / "s" / GENERATION).write_text(text)
    assert load_student(StudentConfig(str(here / "s")), torch.device("cpu"))


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("damage", [cut, holds("tokenizer.json", "{}")], ids=["weights", "tokenizer"])
def test_who_reads_it(damage: Damage, command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(here / "bad")
    said = refusal(capsys, command, MINIMAL[command] | READERS[command], "could be loaded from 'bad'")
    assert said[said.rindex("fastkl: ") :].count("\n") == 1
    assert not Path("runs/a/config.yaml").exists()


@pytest.mark.parametrize("damage", [holds(CONFIG, "{"), configured(hidden_size="big")], ids=["no-json", "wrong-type"])
def test_a_bad_config_is_not_blamed_on_the_tokenizer(damage: Damage, here: Path) -> None:
    damage(here / "bad")
    with pytest.raises(ConfigError, match="no model could be loaded"):
        (
            load_tokenizer(StudentConfig(str(here / "bad"))),
            load_student(StudentConfig(str(here / "bad")), torch.device("cpu")),
        )


@pytest.mark.parametrize("method", ["gguf", "gptq", "fp8", "nosuch"])
def test_a_quantised_student(method: str, here: Path) -> None:
    configured(quantization_config={"quant_method": method, "bits": 4})(here / "bad")
    assert f"quantised ({method}) and cannot be trained" in read(here / "bad")


def test_an_unknown_attention(here: Path) -> None:
    assert '`attn_implementation="nosuch"` is not supported' in read(here / "s", attn_implementation="nosuch")


@pytest.mark.parametrize("settings", [{"student.dtype": "float16"}, {"mixed_precision": "fp16"}], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
def test_a_cpu_does_not_train_in_float16(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value}, in which a CPU does not train; set it to"):
        start_run(config("sft", MINIMAL["sft"] | settings), 1, "examples_per_step")
