"""Several teachers and data sets in one run, the student's own base as a teacher, devices, quantised teachers."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launches import REPOSITORY
from peft import LoraConfig, get_peft_model
from run_cases import counted, distilled, log, refusal, token_logprobs
from run_settings import config, distillation, evaluated
from stub_server import serving
from tiny_data import model_and_sums, read_jsonl, write_jsonl
from tiny_models import llama, save_model, tokenizer
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.head import fuse
from fastkl.trainer.commands import command_line as commands
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.data.mixture import apportion
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models import loading
from fastkl.trainer.runs.folder import check_run_folder
from fastkl.trainer.teachers import open as opening
from fastkl.trainer.teachers.local import LocalTeacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = model_and_sums(tmp_path_factory.mktemp("models"), "student")
    save_model(path / "adder", seed=1, width=24)
    save_model(path / "chatter", seed=2)
    write_jsonl(path / "chats.jsonl", [{"prompt": f"hello {i}?"} for i in range(5)])
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the models that are loaded from here on."""
    paths: list[str] = []
    load = loading.load_model

    def recorded(model: Any, **more: Any) -> Any:
        paths.append(Path(model.path).name)
        return load(model, **more)

    monkeypatch.setattr(loading, "load_model", recorded)
    return paths


def settings(models: Path, run: Path, **overrides: object) -> dict[str, object]:
    return distillation(run, models, **{"teacher__path": models / "adder", **overrides})


def mixture(models: Path, run: Path, entries: dict[str, Any], **overrides: object) -> dict[str, object]:
    """Settings of a run with a mixture alone."""
    alone = {"teacher__path": "", "data__path": "null", "mixture": json.dumps(entries)}
    return settings(models, run, **alone, **overrides)


def entry(models: Path, data: str, weight: float, **teacher: object) -> dict[str, Any]:
    return {"data": {"path": str(models / data)}, "weight": weight, "teacher": teacher or None}


def two(models: Path) -> dict[str, Any]:
    return {
        "math": entry(models, "sums.jsonl", 2, path=str(models / "adder")),
        "chat": entry(models, "chats.jsonl", 1, path=str(models / "chatter")),
    }


@pytest.mark.parametrize("weights", [[1.0], [2.0, 1.0], [0.1, 0.7, 0.2], [5.0, 5.0, 5.0], [1000.0, 1.0, 0.5]])
def test_shares_follow_the_weights(weights: list[float]) -> None:
    whole = apportion(weights, 0, 700)
    counts: Counter[int] = Counter()
    for places, (who, before) in enumerate(whole, start=1):
        assert before == counts[who]
        counts[who] += 1
        for index, weight in enumerate(weights):
            share = Fraction(weight) / sum(map(Fraction, weights))
            assert abs(counts[index] - places * share) <= (1 + share * len(weights)) / 2
    for first, count in ((0, 1), (13, 50), (350, 7), (693, 7)):  # wherever one begins
        assert apportion(weights, first, count) == whole[first : first + count]


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl", "top_k"])
def test_each_data_set_has_its_own_teacher(tmp_path: Path, models: Path, objective: str) -> None:
    path = distilled(mixture(models, tmp_path / "run", two(models), loss__objective=objective, optim__substeps=2))
    teachers = {
        name: AutoModelForCausalLM.from_pretrained(models / of) for name, of in (("math", "adder"), ("chat", "chatter"))
    }
    samples = read_jsonl(path / "samples.jsonl")
    assert Counter(sample["dataset"] for sample in samples) == {"math": 12, "chat": 6}  # of 3 steps of 6
    # Every row of a data set comes once before any comes twice; rows are counted through all data sets, by name.
    assert sorted(s["prompt_index"] for s in samples if s["dataset"] == "math") == list(range(5, 17))
    assert {s["prompt_index"] for s in samples if s["dataset"] == "chat"} == set(range(5))
    gaps: dict[tuple[int, str], list[float]] = {}
    for sample in samples:
        wanted = torch.zeros(len(sample["ids"]))  # where nothing counts
        wanted[sample["loss_mask"]] = token_logprobs(teachers[sample["dataset"]], sample).detach()
        torch.testing.assert_close(torch.tensor(sample["teacher_logprobs"]), wanted, atol=1e-4, rtol=1e-4)
        ours, theirs = counted(sample, "sampler_logprobs"), counted(sample, "teacher_logprobs")
        for name in ("", sample["dataset"]):
            gaps.setdefault((sample["step"], name), []).extend(a - b for a, b in zip(ours, theirs, strict=True))
    for row in log(path):
        for name in ("", "math", "chat"):
            gap = gaps[row["step"], name]
            assert row[f"teacher_kl/{name}" if name else "teacher_kl"] == pytest.approx(sum(gap) / len(gap), rel=1e-5)


def test_the_order_of_a_mixture_does_not_matter_and_it_resumes(tmp_path: Path, models: Path) -> None:
    entries = two(models)
    whole = distilled(mixture(models, tmp_path / "whole", entries))
    other = dict(reversed(entries.items()))
    again = distilled(mixture(models, tmp_path / "again", other))
    assert (again / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    distilled(mixture(models, tmp_path / "whole", other))  # the same run: nothing is left to do


def test_one_data_set_of_a_mixture_is_the_run_without_one(tmp_path: Path, models: Path) -> None:
    alone = distilled(settings(models, tmp_path / "alone", optim__steps=1))
    entries = {"math": entry(models, "sums.jsonl", 3, path=str(models / "adder"))}
    mixed = distilled(mixture(models, tmp_path / "mixed", entries, optim__steps=1))
    assert {*log(mixed)[0]} == {*log(alone)[0], "teacher_kl/math"}


def test_equal_teachers_are_loaded_once(tmp_path: Path, models: Path, loads: list[str]) -> None:
    entries = two(models) | {"more": entry(models, "chats.jsonl", 1), "most": entry(models, "chats.jsonl", 1)}
    distilled(mixture(models, tmp_path / "run", entries, optim__steps=1) | {"teacher.path": models / "adder"})
    assert sorted(loads) == ["adder", "chatter", "student"]


def test_teachers_here_and_on_a_server(tmp_path: Path, models: Path) -> None:
    local = distilled(mixture(models, tmp_path / "local", two(models), optim__steps=1))
    with serving(models / "chatter") as stub:
        entries = two(models)
        entries["chat"]["teacher"] = {"server": {"url": stub.url, "model": "stub"}}
        path = distilled(mixture(models, tmp_path / "run", entries, optim__steps=1))
        row, wanted = log(path)[0], log(local)[0]
        del wanted["flops/teacher"]  # a server does not tell the size of its model
        assert row == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        # A server may be found elsewhere, its model may not change.
        entries["chat"]["teacher"]["server"]["url"] = "http://127.0.0.1:9/v1"
        check_run_folder(config("distill", mixture(models, tmp_path / "run", entries, optim__steps=1)))
        entries["chat"]["teacher"]["server"]["model"] = "other"
        with pytest.raises(ConfigError, match=r"mixture\.chat\.teacher\.server\.model was 'stub' and is 'other'"):
            check_run_folder(config("distill", mixture(models, tmp_path / "run", entries, optim__steps=1)))


def test_each_data_set_is_checked_with_its_teacher(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "short", max_position_embeddings=16)
    entries = two(models) | {"short": entry(models, "chats.jsonl", 1, path=str(tmp_path / "short"))}
    run = mixture(models, tmp_path / "run", entries)
    refusal(capsys, "distill", run, "the teacher of short's context of 16", "mixture.short.data.max_prompt_tokens")
    assert not (tmp_path / "run").exists()


MIXTURES = {
    "data": ({"data.path": "d.jsonl"}, {}, ["data.path is 'd.jsonl'", "mixture has the data sets math, chat"]),
    "teacher": ({"teacher.path": "t"}, {}, ["teacher is set", "math, chat", "unset one"]),
    "weight": ({}, {"weight": 0}, ["mixture.math.weight is 0", "> 0"]),
    "source": ({}, {"data": {}}, ["mixture.math.data.path is None", "exactly one"]),
    "no-teacher": ({}, {"teacher": None}, ["teacher.path is empty", "model folder or a Hub id"]),
    "its-teacher": ({}, {"teacher": {"dtype": "bfloat16"}}, ["mixture.math.teacher.path is empty"]),
    "base": ({}, {"teacher": {"self": "base"}}, ["mixture.math.teacher.self is base", "student.lora.rank"]),
    "live": ({}, {"teacher": {"self": "live"}}, ["mixture.math.teacher.self is live", "its KL is 0"]),
    "renamed": (
        {},
        {"teacher": {"base_of_student": True}},
        ["mixture.math.teacher.base_of_student", "did you mean mixture.math.teacher.self"],
    ),
}


@pytest.mark.parametrize(("extra", "changes", "parts"), MIXTURES.values(), ids=MIXTURES)
def test_refused_mixtures(
    tmp_path: Path, models: Path, extra: dict[str, object], changes: dict[str, Any], parts: list[str]
) -> None:
    entries = two(models)
    entries["math"] |= changes
    with pytest.raises(ConfigError) as error:
        config("distill", mixture(models, tmp_path / "run", entries) | extra)
    assert [part for part in parts if part not in str(error.value)] == [], error.value


def test_the_name_of_a_data_set_is_that_of_a_metric(tmp_path: Path, models: Path) -> None:
    message = "mixture has a data set 'a/b', and its name becomes that of a metric; use only letters, digits, _ and -"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        config("distill", mixture(models, tmp_path / "run", {"a/b": two(models)["math"]}))


def test_the_mixture_in_the_documentation_runs(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "docs" / "teachers" / "teachers.md").read_text(encoding="utf-8")
    block = text.split("## Several teachers")[1].split("```yaml\n")[1].split("```")[0]
    names = {"runs/two": "run", "math.jsonl": "sums.jsonl", "chat.jsonl": "chats.jsonl"}
    names |= {"models/student": "student", "models/mathematician": "adder", "models/chatter": "chatter"}
    for name, stand_in in names.items():
        assert name in block
        block = block.replace(name, stand_in if stand_in == "run" else str(models / stand_in))
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(block, encoding="utf-8")
    small = ["--optim.steps=1", "--sampling.max_new_tokens=4", "--sampling.prompts_per_step=6"]
    assert cli.main(["distill", "two.yaml", *small]) == 0
    assert set(yaml.safe_load(block)["mixture"]) == {"math", "chat"}
    assert {"teacher_kl/math", "teacher_kl/chat"} <= {*log(Path("run"))[0]}


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl", "top_k"])
def test_the_base_of_a_lora_student_is_its_teacher_without_a_copy(
    tmp_path: Path, models: Path, objective: str, loads: list[str]
) -> None:
    shared = {"student__lora__rank": 2, "loss__objective": objective, "optim__lr": 0.1, **evaluated(models)}
    own = settings(models, tmp_path / "own", **shared) | {"teacher.path": "", "teacher.self": "base"}
    rows = log(distilled(own))
    assert loads == ["student"]
    copied = log(distilled(settings(models, tmp_path / "copy", **shared, teacher__path=models / "student")))
    assert loads == ["student", "student", "student"]
    first, *_, last = rows[1:]
    assert first["teacher_kl"] == pytest.approx(0, abs=1e-6)  # a new adapter does nothing
    for a, b in zip(rows, copied, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert last["step"] == 3


def test_the_base_under_a_head_that_is_trained_in_full() -> None:
    base = llama(56, tie_word_embeddings=False)
    samples = [make_sample([5, 6, 7], [8, 9, 10], 0)]
    LocalTeacher(fuse(base), "padded", 16384, 1.0, CPU).score(samples)
    wanted = samples[0].teacher_logprobs
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter))
    fused = fuse(model)
    teacher = LocalTeacher(fused, "padded", 16384, 1.0, CPU, as_teacher=model.disable_adapter)
    teacher.score(samples)
    assert samples[0].teacher_logprobs == pytest.approx(wanted, abs=1e-5)
    original = base.get_output_embeddings().original_module.weight
    assert teacher.head(samples, CPU).weight.data_ptr() == original.data_ptr()
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)
    LocalTeacher(fused, "padded", 16384, 1.0, CPU).score(samples)
    assert samples[0].teacher_logprobs != pytest.approx(wanted, abs=0.1)


def test_a_teacher_on_a_device_of_its_own(tmp_path: Path, models: Path) -> None:
    runs = [settings(models, tmp_path / name, optim__steps=1, teacher__device=name) for name in ("null", "cpu")]
    assert log(distilled(runs[0])) == log(distilled(runs[1]))
    for device in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=rf"teacher\.device is '{device}', which cannot be used here"):
            distilled(settings(models, tmp_path / "run", teacher__device=device))
    assert not (tmp_path / "run").exists()


def test_what_a_teacher_elsewhere_gives_is_brought_to_the_student(models: Path) -> None:
    """The meta device stands for another one: no numbers, but places."""
    model = AutoModelForCausalLM.from_pretrained(models / "adder").requires_grad_(False)
    teacher = LocalTeacher(fuse(model), "padded", 16384, 1.0, CPU)
    first, again = (teacher.head([make_sample([5, 6], [7, 8, 9], 0)], torch.device("meta")) for _ in range(2))
    assert first.hidden.device.type == first.weight.device.type == "meta"
    assert first.hidden.shape == (3, 24)
    assert first.weight is again.weight  # copied once


def test_quantisation_needs_its_package_and_plain_weights(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ConfigError, match=r"teacher\.quantization is 4bit, which needs the package bitsandbytes"):
        opening.load_teacher(TeacherConfig(path=str(models / "adder"), quantization="4bit"), CPU)
    described = save_model(tmp_path / "quantised") / "config.json"
    values = json.loads(described.read_text(encoding="utf-8")) | {"quantization_config": {"quant_method": "fp8"}}
    described.write_text(json.dumps(values), encoding="utf-8")
    message = r"teacher\.quantization is 8bit, but the weights in .* are quantised already"
    with pytest.raises(ConfigError, match=message):
        opening.load_teacher(TeacherConfig(path=str(tmp_path / "quantised"), quantization="8bit"), CPU)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl"])
def test_a_quantised_teacher(tmp_path: Path, models: Path, quantization: str, objective: str) -> None:
    """Its blocks are in few bits, its head is plain; so it is when it comes from a folder that is quantised already."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    save_model(tmp_path / "wide", seed=1, width=64, initializer_range=0.1, tie_word_embeddings=False)
    model = opening.load_teacher(TeacherConfig(path=str(tmp_path / "wide"), quantization=quantization), CPU)
    layer = bitsandbytes.nn.Linear8bitLt if quantization == "8bit" else bitsandbytes.nn.Linear4bit
    assert isinstance(model.model.layers[0].mlp.up_proj, layer)
    assert type(model.lm_head) is torch.nn.Linear
    model.save_pretrained(tmp_path / "stored")
    tokenizer().save_pretrained(tmp_path / "stored")
    rows = []
    for name, teacher in (
        ("asked", {"teacher.path": tmp_path / "wide", "teacher.quantization": quantization}),
        ("stored", {"teacher.path": tmp_path / "stored"}),
        ("plain", {"teacher.path": tmp_path / "wide"}),
    ):
        run = settings(models, tmp_path / f"run-{name}", optim__steps=1, loss__objective=objective) | teacher
        rows.append(log(distilled(run))[0])
    asked, stored, plain = rows
    assert stored == pytest.approx(asked, rel=1e-5)
    assert asked["teacher_kl"] == pytest.approx(plain["teacher_kl"], rel=0.2)
    assert asked["teacher_kl"] != plain["teacher_kl"]


def test_a_config_with_a_mixture_comes_from_one_yaml_file(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "two.yaml"
    values = {"run": "r", "student": {"path": "s"}, "mixture": two(models)}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    parsed = commands.parse(["distill", str(file), "--mixture.math.weight=3"])[1]
    assert parsed.mixture["math"].weight == 3
    assert parsed.mixture["chat"].teacher.path == str(models / "chatter")
