"""The student as its own teacher: its weights as they are, averaged, or of some steps ago."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from run_cases import check_equal, counted, distilled, interrupt, log, token_logprobs
from run_settings import Settings, arguments, distillation
from safetensors.torch import load_file
from tiny_data import read_jsonl
from tiny_models import llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.head import fuse
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.data.samples import make_sample
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher
from fastkl.trainer.teachers.second_weights import SecondWeights

CPU = torch.device("cpu")
RATE = 0.3
REWARDED: Settings = {
    **{"teacher__path": "", "optim__steps": 4, "optim__substeps": 2, "optim__lr": 0.05},
    **{"reward__grader": "regex:[0-4]$", "reward__baseline": "none"},
}
LORA: Settings = {"student__lora__rank": 2}
KINDS: dict[str, Settings] = {
    "live": {"teacher__self": "live"},
    "ema": {"teacher__self": "ema", "teacher__ema_rate": RATE},
    "synced": {"teacher__self": "synced", "teacher__sync_every": 2},
}


class Trace:
    """θ and θ' at the start and after every optimizer step of a run, in float64; then after its steps, the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.theirs: list[dict[str, Tensor]] = []
        self.ours: list[dict[str, Tensor]] = []
        self.seconds: list[SecondWeights] = []
        self.students: list[Student] = []
        made, stepped = SecondWeights.__init__, SecondWeights.stepped

        def make(second: SecondWeights, config: TeacherConfig, student: Student, device: torch.device) -> None:
            made(second, config, student, device)
            self.seconds.append(second)
            self.students.append(student)
            self._note(second)

        def step(second: SecondWeights) -> None:
            stepped(second)
            self._note(second)

        monkeypatch.setattr(SecondWeights, "__init__", make)
        monkeypatch.setattr(SecondWeights, "stepped", step)

    def _note(self, second: SecondWeights) -> None:
        weights = second._held
        self.ours.append({name: weight.source.detach().double().clone() for name, weight in weights.items()})
        self.theirs.append({name: weight.held.detach().double().clone() for name, weight in weights.items()})


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(monkeypatch)


def settings(folder: Path, run: Path, kind: str, **more: object) -> Settings:
    return distillation(run, folder, **{**REWARDED, **KINDS[kind], **more})


@pytest.mark.parametrize("more", [{}, LORA, {"student__dtype": "bfloat16"}], ids=["full", "lora", "bfloat16"])
def test_an_average_is_its_closed_form(folder: Path, tmp_path: Path, trace: Trace, more: Settings) -> None:
    rate = 0.01
    distilled(settings(folder, tmp_path / "run", "ema", teacher__ema_rate=rate, **more))
    assert len(trace.ours) == 1 + 4 * 2
    (second,), (student,) = trace.seconds, trace.students
    assert {*second._held} == {name for name, p in student.plain.named_parameters() if p.requires_grad}
    moved = 0.0
    for n, theirs in enumerate(trace.theirs):
        for name, found in theirs.items():
            past = [ours[name] for ours in trace.ours[: n + 1]]
            wanted = (1 - rate) ** n * past[0]
            wanted = wanted + sum(rate * (1 - rate) ** (n - k) * past[k] for k in range(1, n + 1))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
            moved = max(moved, float((past[n] - past[0]).abs().max()))
    assert moved > 0.01
    for weight in second._held.values():
        assert weight.held.dtype == torch.float32
        torch.testing.assert_close(weight.shown, weight.held.to(weight.source.dtype), rtol=0, atol=0)


def test_synced_weights_are_those_of_some_steps_ago(folder: Path, tmp_path: Path, trace: Trace) -> None:
    distilled(settings(folder, tmp_path / "run", "synced"))
    taken = [0, 0, 0, 0, 0, 4, 4, 4, 4]  # after each optimizer step, two a step: which ones the copy has
    for theirs, index in zip(trace.theirs, taken, strict=True):
        assert all(torch.equal(found, trace.ours[index][name]) for name, found in theirs.items())
    assert any(not torch.equal(a, b) for a, b in zip(trace.ours[4].values(), trace.ours[0].values(), strict=True))


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl", "top_k"])
def test_it_scores_with_the_weights_of_that_moment(folder: Path, tmp_path: Path, trace: Trace, objective: str) -> None:
    """Those at the start of a step; of the optimizer step, where whole distributions are compared."""
    own = {"data": {"path": str(folder / "sums.jsonl")}, "teacher": {"self": "ema", "ema_rate": RATE}}
    entries = {"own": own, "other": own | {"teacher": {"path": str(folder / "teacher")}}}
    more: Settings = {"data__path": "null", "mixture": json.dumps(entries), "loss__objective": objective}
    plain = {name: value for name, value in REWARDED.items() if not name.startswith("reward")}
    path = distilled(distillation(tmp_path / "run", folder, **{**plain, **more}))
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    for step in range(1, 5):
        samples = [sample for sample in read_jsonl(path / "samples.jsonl") if sample["step"] == step]
        for index, sample in enumerate(samples):
            if sample["dataset"] == "other":
                continue
            at = 2 * (step - 1) + (index % 2 if objective == "reverse_kl" else 0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(trace.theirs[at][name])
            wanted = token_logprobs(model, sample).detach()
            torch.testing.assert_close(torch.tensor(counted(sample, "teacher_logprobs")), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_a_live_teacher_says_what_the_student_says(folder: Path, tmp_path: Path, more: Settings) -> None:
    """Its KL is 0 whatever is learned."""
    path = distilled(settings(folder, tmp_path / "run", "live", **more))
    for row in log(path):
        assert row["teacher_kl"] == pytest.approx(0, abs=1e-5)
        assert row["flops/teacher"] > 0
    for sample in read_jsonl(path / "samples.jsonl"):
        assert sample["teacher_ranks"] == sample["student_ranks"]
        assert sample["teacher_logprobs"] == pytest.approx(sample["sampler_logprobs"], abs=1e-4)


@pytest.mark.parametrize("more", [{}, LORA], ids=["full", "lora"])
def test_nothing_else_of_the_run_knows_of_it(folder: Path, tmp_path: Path, trace: Trace, more: Settings) -> None:
    path = distilled(settings(folder, tmp_path / "run", "ema", checkpoint__every=4, **more))
    plain = distilled(distillation(tmp_path / "plain", folder, **{**REWARDED, **more, "loss__kl_coef": 0}))
    (student,), (second,) = trace.students, trace.seconds
    theirs = {id(parameter) for parameter in second.model.parameters()}
    trained = {id(parameter) for group in student.optimizer.param_groups for parameter in group["params"]}
    assert not theirs & trained
    assert not any(parameter.requires_grad for parameter in second.model.parameters())
    shared = theirs & {id(parameter) for parameter in student.plain.parameters()}
    assert shared == (base(student) if more else set())
    files = [sorted(file.relative_to(run) for file in run.glob("student/**/*")) for run in (path, plain)]
    assert files[0] == files[1]
    for name in (file for file in files[0] if file.suffix == ".safetensors"):
        ours, others = load_file(path / name), load_file(plain / name)
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in others.items()}
    (checkpoint,) = (path / "checkpoints").iterdir()
    moments = torch.load(checkpoint / "optimizer.bin", weights_only=False)["state"]
    assert len(moments) == len(trained)
    assert log(path)[0]["flops/student"] == log(plain)[0]["flops/student"]


def base(student: Student) -> set[int]:
    return {id(parameter) for parameter in student.plain.parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        pytest.param("ema", LORA, id="ema-lora"),
        pytest.param("synced", {}, id="synced"),
        pytest.param("ema", {}, id="ema", marks=pytest.mark.slow),
        pytest.param("ema", {"student__dtype": "bfloat16"}, id="ema-bfloat16", marks=pytest.mark.slow),
        pytest.param("live", {}, id="live", marks=pytest.mark.slow),
    ],
)
def test_it_resumes_exactly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, more: Settings
) -> None:
    """Between two renewals of `synced` too."""
    whole = distilled(settings(folder, tmp_path / "whole", kind, **more))
    run = settings(folder, tmp_path / "run", kind, **more)
    interrupt(monkeypatch, run, 3)
    assert cli.main(arguments("distill", run)) == 0
    check_equal(tmp_path / "run", whole)


def test_a_skipped_optimizer_step_moves_no_average(
    folder: Path, tmp_path: Path, trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Student._clip
    calls = itertools.count(1)
    monkeypatch.setattr(Student, "_clip", lambda self: math.nan if next(calls) == 3 else clip(self))
    distilled(settings(folder, tmp_path / "run", "ema"))
    assert len(trace.theirs) == 1 + 4 * 2 - 1


def test_one_on_a_device_of_its_own(folder: Path, tmp_path: Path) -> None:
    runs = [settings(folder, tmp_path / name, "ema", teacher__device=name) for name in ("null", "cpu")]
    assert log(distilled(runs[0])) == log(distilled(runs[1]))


def test_a_head_that_moves_is_copied_again(folder: Path) -> None:
    """To another device: the meta device stands for one."""
    model = AutoModelForCausalLM.from_pretrained(folder / "student").requires_grad_(False)
    teacher, samples = LocalTeacher(fuse(model), "padded", 16384, 1.0, CPU), [make_sample([5, 6], [7, 8, 9], 0)]
    meta = torch.device("meta")
    first, again = (teacher.head(samples, meta).weight for _ in range(2))
    assert first is again
    model.get_output_embeddings().weight.lerp_(torch.zeros(()), 0.5)
    assert teacher.head(samples, meta).weight is not first


HEADS: dict[str, Callable[[], Any]] = {
    "tied": lambda: llama(56),
    "untied": lambda: llama(56, tie_word_embeddings=False),
    "saved": lambda: get_peft_model(
        llama(56, tie_word_embeddings=False),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ),
    "part": lambda: frozen_blocks(llama(56)),
}


def frozen_blocks(model: Any) -> Any:
    model.model.layers.requires_grad_(False)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_every_kind_of_head(head: str) -> None:
    model = fuse(HEADS[head]()).eval()
    before = copy.deepcopy(model.state_dict())
    student: Any = SimpleNamespace(plain=model, model=model, sharded=False)
    second = SecondWeights(TeacherConfig(self="ema", ema_rate=0.5), student, CPU)
    samples = [make_sample([5, 6, 7], [8, 9, 10], 0)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    second.stepped()
    half = {name: (tensor + model.state_dict()[name]) / 2 for name, tensor in before.items()}
    assert half.keys() == second.model.state_dict().keys()
    for name, found in second.model.state_dict().items():
        torch.testing.assert_close(found, half[name])
    LocalTeacher(second.model, "padded", 16384, 1.0, CPU).score(samples)
    found = samples[0].teacher_logprobs
    model.load_state_dict(half)
    LocalTeacher(model, "padded", 16384, 1.0, CPU).score(samples)
    assert samples[0].teacher_logprobs == pytest.approx(found, abs=1e-5)
    pairs = zip(model.parameters(), second.model.parameters(), strict=True)
    assert all((ours is theirs) == (not ours.requires_grad) for ours, theirs in pairs)


def test_equal_ones_share_their_weights(folder: Path, tmp_path: Path, trace: Trace) -> None:
    teachers = ({"self": "ema", "ema_rate": 0.1}, {"self": "ema", "ema_rate": 0.1}, {"self": "ema", "ema_rate": 0.2})
    data = {"path": str(folder / "sums.jsonl")}
    entries = {f"part{index}": {"data": data, "teacher": teacher} for index, teacher in enumerate(teachers)}
    run = distillation(tmp_path / "run", folder, **{**REWARDED, "optim__steps": 1, "data__path": "null"})
    distilled(run | {"mixture": json.dumps(entries)})
    assert len(trace.seconds) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (REWARDED, False),
        ({"teacher__path": ""}, True),
        ({"teacher__path": "", "sampling__on_policy_fraction": 0.5}, False),
        ({"teacher__path": "", "sampling__on_policy_fraction": 0.5, "loss__objective": "jsd"}, True),
        ({"teacher__path": "", "loss__extrapolate": 1.5, "reference__path": "teacher"}, False),
    ],
    ids=["rewarded", "alone", "given", "given-and-judged", "away"],
)
def test_a_run_that_cannot_begin_says_so(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: Settings,
    said: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    run = distillation(tmp_path / "run", folder, **{**more, **KINDS["ema"]})
    assert cli.main([*arguments("distill", run), "--dry-run"]) == 0
    assert ("the KL begins at 0 and stays there" in capsys.readouterr().err) == said
