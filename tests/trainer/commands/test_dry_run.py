"""`--dry-run`: what it counts is what a run does, it refuses what a run refuses, and leaves nothing behind."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_settings import arguments, distillation, training
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import causal_lm, save_model, tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastkl import cli
from fastkl.trainer.commands.plan import sizes
from fastkl.trainer.commands.plan.sizes import Shape
from fastkl.trainer.config.models import LoraConfig, ModelConfig, StudentConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.models.loading import load_student, outline_of_student
from fastkl.trainer.models.modes import updating
from fastkl.trainer.models.pretrained import outline
from fastkl.trainer.models.sizes.flops import cost_of, without_adapter
from fastkl.trainer.rollouts.samplers.in_progress import InProgress
from fastkl.trainer.teachers.second_weights import SecondWeights

CPU = torch.device("cpu")


def table(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*line, "--dry-run"]) == 0
    return capsys.readouterr().out


def lasting(text: str) -> list[str]:
    """A table without the memory that the process has at the moment."""
    return [line for line in text.splitlines() if not line.endswith(("Python and libraries, as now", "at the peak"))]


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loaded)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("distill", {}),
        ("distill", {"mixed_precision": "bf16", "student__lora__rank": 2}),
        ("distill", {"loss__objective": "top_k", "loss__top_k_of": "both"}),
        ("sft", {}),
    ],
    ids=str,
)
def test_a_step_is_counted_without_weights(
    command: str, more: dict[str, object], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = distillation if command == "distill" else training
    text = table(arguments(command, made(tmp_path / "new" / "run", folder, **more)), capsys)
    assert "12 prompts of 6 to 9 tokens, 7 on average" in text
    for word in ("FLOPs", "the student's weights", "Adam's two moments", "update: activations", "at the peak"):
        assert word in text
    assert ("sampling" in text) == ("weights of teacher" in text) == (command == "distill")
    assert ("pass before the update" in text) == ("loss__top_k_of" in more)
    assert "unknown" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("kind", "held", "lora"),
    [
        pytest.param({"self": kind, **more}, held, rank, id=f"{kind}-{rank}")
        for kind, more, held, ranks in (
            ("base", {}, 0, (2,)),
            ("live", {}, 0, (0, 2)),
            ("ema", {"ema_rate": 0.1}, 1, (0, 2)),
            ("synced", {"sync_every": 2}, 1, (0, 2)),
        )
        for rank in ranks
    ],
)
def test_a_teacher_that_is_the_student(
    kind: dict[str, object], held: int, lora: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its passes cost what the student's do, without the adapter for the base; it takes no weights but its own."""
    more = {f"teacher__{name}": value for name, value in kind.items()} | {"student__lora__rank": lora}
    more |= {"teacher__path": "", "reward__grader": "boxed", "reward__baseline": "none"}
    text = table(arguments("distill", distillation(tmp_path / "run", folder, **more)), capsys)
    student = cost_of(outline_of_student(StudentConfig(path=str(folder / "student"), lora=LoraConfig(rank=lora))))
    cost = without_adapter(student) if kind["self"] == "base" else student
    (flops, tokens) = (
        re.findall(rf"FLOPs +(\S+) +teacher {kind['self']}", text),
        re.findall(r"at most (\S+) tokens\n", text),
    )
    assert len(flops) == len(tokens) == 1
    assert float(flops[0]) == pytest.approx((cost.blocks * int(tokens[0]) + cost.head * 6 * 8), rel=0.1)
    assert text.count(f"the weights of teacher {kind['self']}, beside the student's") == held
    assert "teacher: a layer" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_weights_are_of_the_size_that_is_told(folder: Path, dtype: str) -> None:
    for rank, averaged in itertools.product((0, 2), (False, True)):
        student = load_student(StudentConfig(str(folder / "student"), dtype, lora=LoraConfig(rank=rank)), CPU)
        config = TeacherConfig(self="ema", ema_rate=0.1) if averaged else TeacherConfig(self="synced", sync_every=2)
        held = SecondWeights(config, SimpleNamespace(plain=student, model=student, sharded=False), CPU)._held.values()
        found = {
            id(part): part.numel() * part.element_size() for weight in held for part in (weight.held, weight.shown)
        }
        assert sizes.second_weights(student, averaged=averaged, sharded=False) == sum(found.values())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("base", [False, True], ids=["folder", "base"])
def test_a_reference_is_counted(base: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its forward pass, its weights unless they are the student's, and what an exact KL adds."""
    settings = distillation(tmp_path / "run", folder, student__lora__rank=2)
    plain = table(arguments("distill", settings), capsys)
    assert "reference" not in plain
    assert "the student's pass before the update" not in plain
    more = {"reference.self": "base"} if base else {"reference.path": folder / "teacher"}
    settings |= {"loss.extrapolate": 1.5, "loss.baseline": "kl", **more}
    text = table(arguments("distill", settings), capsys)
    flops = {name: value for value, name in re.findall(r"FLOPs +(\S+)  (.*)", text)}
    assert float(flops["the student's pass before the update"]) > 0
    if base:  # an adapter is off
        assert 0 < float(flops["reference base"]) < float(flops["the student's pass before the update"])
        assert "weights of reference" not in text
    else:
        assert flops[f"reference {folder / 'teacher'}"] == flops[f"teacher {folder / 'teacher'}"]
        assert f"the weights of reference {folder / 'teacher'}" in text
    assert "reference: a chunk of logits" in text


def test_flops_and_passes_are_those_of_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of given completions nothing is left to chance: they are equal."""
    line = arguments("sft", training(tmp_path / "run", folder, optim__steps=1, batch__max_tokens=40))
    text = table(line, capsys)
    assert cli.main(line) == 0
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    (flops,) = re.findall(r"FLOPs +(\S+) +the student's update", text)
    assert float(flops) == pytest.approx(row["flops/student"], rel=0.01)
    assert lasting(table(line, capsys)) == lasting(text)  # a run that is there is left as it is
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"student.path": "./nosuch"}, ["./nosuch", "no config.json"]),
        ({"sampling.max_new_tokens": 100}, ["student's context of 64"]),
        ({"teacher.path": "short"}, ["the teacher's context of 8"]),
        ({"teacher.path": "small"}, ["the teacher small's head has"]),
        ({"loss.extrapolate": 2, "reference.path": "short"}, ["reference short's context of 8"]),
        ({"eval.data.path": "sums.jsonl", "eval.grader": "vibes"}, ["eval.grader is 'vibes'"]),
        ({"run": "sums.jsonl"}, ["sums.jsonl exists and is not a run folder"]),
        ({"trackers": ["nosuch"]}, ["trackers has 'nosuch'"]),
    ],
    ids=str,
)
def test_it_refuses_what_a_run_would_refuse(
    settings: dict[str, object],
    parts: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(Path("short"), max_position_embeddings=8)
    save_model(Path("small"), vocabulary=10)
    write_jsonl(Path("sums.jsonl"), sums(3))
    before = sorted(tmp_path.rglob("*"))
    line = arguments("distill", distillation(tmp_path / "run", folder) | settings)
    assert cli.main([*line, "--dry-run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert [part for part in parts if part not in error] == [], error
    assert sorted(tmp_path.rglob("*")) == before


ATTENTION = {"gemma2": "eager"}  # it has no other


def kept(model: Any, shape: Shape, dropout: Any, autocast: bool) -> float:
    """Bytes of what a real forward pass keeps for the backward pass, up to the head."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def stop(module: nn.Module, inputs: Any) -> None:
        raise InterruptedError

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    ids = torch.zeros(shape.rows, shape.width, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    positions = torch.arange(shape.width).expand_as(ids)
    with updating(model, dropout), saved, cast, pytest.raises(InterruptedError):
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hook.remove()
    return sum(found.values()) + shape.counted * model.get_output_embeddings().weight.shape[1] * 4.0


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "gemma3_text", "mixtral"))]
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LoraConfig(rank=3)}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_memory_is_that_of_the_real_model(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Weights, gradients, and all that the autograd graph keeps."""
    causal_lm(kind, ATTENTION.get(kind, "sdpa")).save_pretrained(tmp_path)
    config, shape = StudentConfig(path=str(tmp_path), **settings), Shape(3, 11, 20)
    without, real = outline_of_student(config), load_student(config, torch.device("cpu"))
    assert sizes.weights(without) == sizes.weights(real)
    assert sizes.gradients(without) == sizes.gradients(real)
    for autocast in (False, True) if config.dtype == "float32" else (False,):
        found = sizes.activations(without, shape, "padded", torch.bfloat16 if autocast else None, "off")
        if found is None:
            assert kind == "mixtral"  # experts are chosen by value
        else:
            assert found == pytest.approx(kept(real, shape, "off", autocast), abs=16)  # constants of the model's code


def test_a_cache_is_as_large_as_the_keys_and_values_in_it() -> None:
    for kind in ("llama", "gemma2", "mistral"):
        model = causal_lm(kind, ATTENTION.get(kind, "sdpa"))
        cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert sizes.cache(model, InProgress(2, 14, paged=False, batch_tokens=14), 7, 4) == held, kind


def test_a_quantised_teacher_is_smaller(tmp_path: Path) -> None:
    model = outline(ModelConfig(path=str(save_model(tmp_path, width=64))))
    found = [sizes.weights(model, quantization) for quantization in (None, "8bit", "4bit")]
    head = len(tokenizer()) * 64 * 4
    assert found[0] > found[1] > found[2] > head


PEAK = """
import resource, sys
from fastkl.cli import main
status = main(sys.argv[1:])
print("measured", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"student.lora.rank": 16}, {"student.gradient_checkpointing": "true"}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_the_peak_is_near_what_is_measured(more: dict[str, object], tmp_path: Path) -> None:
    size = {"max_position_embeddings": 256, "num_attention_heads": 8, "vocabulary": 16000}
    save_model(tmp_path / "student", layers=8, width=512, **size)
    save_model(tmp_path / "teacher", layers=8, width=768, **size)
    write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1+" * 60}] * 16)
    settings = distillation(tmp_path / "run", tmp_path, optim__steps=2, log_samples=0, sampling__prompts_per_step=16)
    line = arguments("distill", settings | more)
    peaks = []
    for words, found in (([*line, "--dry-run"], r"(\S+)  at the peak"), (line, r"measured (\d+)")):
        done = subprocess.run([sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=True)
        peaks.append(float(re.findall(found, done.stdout)[0]))
    assert 0.85 < peaks[0] * 2**30 / peaks[1] < 1.25, peaks  # too much is the safe side
