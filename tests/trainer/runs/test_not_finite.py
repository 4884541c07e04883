"""Models that give NaN: one sentence before the first step, or at the step where it begins, and never a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import refusal
from run_settings import Settings, distillation, training
from safetensors.torch import load_file, save_file

from fastkl.trainer.objectives.base import Objective
from fastkl.trainer.student import Student

BROKEN = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def broken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair of `folder` with one weight of each that is NaN."""
    path = shutil.copytree(folder, tmp_path_factory.mktemp("broken") / "pair")
    for name in ("student", "teacher"):
        file = path / name / "model.safetensors"
        weights = {key: tensor.clone() for key, tensor in load_file(file).items()}
        weights[BROKEN][0, 0] = torch.nan
        save_file(weights, file, metadata={"format": "pt"})
    return path


def commands(folder: Path, broken: Path, run: Path) -> dict[str, tuple[str, str, Settings]]:
    """A command, and what it calls the model whose weights are not finite."""
    student, teacher = {"student.path": broken / "student"}, {"teacher.path": broken / "teacher"}
    both = distillation(run, folder, optim__steps=1)
    scored = {"output": run, "data.path": folder / "sums.jsonl", "model.path": broken / "teacher"}
    answered = {"eval.data.path": folder / "sums.jsonl", "eval.max_new_tokens": 4, "model.path": broken / "student"}
    return {
        "distill-student": ("distill", "student", both | student),
        "distill-continuous": ("distill", "student", both | student | {"sampling.engine": "continuous_batching"}),
        "distill-teacher": ("distill", "teacher", both | teacher),
        "distill-divergence": ("distill", "teacher", both | teacher | {"loss.objective": "jsd"}),
        "sft": ("sft", "student", training(run, folder, examples_per_step=4, optim__steps=1) | student),
        "eval": ("eval", "model", answered),
        "score": ("score", "model", scored),
    }


@pytest.mark.parametrize("name", commands(Path(), Path(), Path()))
def test_weights_that_are_not_finite_are_one_sentence(
    tmp_path: Path, folder: Path, broken: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, whose, settings = commands(folder, broken, tmp_path / "run")[name]
    error = refusal(capsys, command, settings, "not finite", BROKEN)
    assert error.splitlines()[-1].startswith((f"fastkl: {whose}: ", f"fastkl: the {whose}'s logits"))


@pytest.mark.parametrize("engine", ["generate", "continuous_batching"])
def test_weights_that_an_update_broke_are_one_sentence(
    tmp_path: Path, folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = Student.update

    def breaking(self: Student, samples: Any, objective: Objective, step: int) -> dict[str, float]:
        metrics = update(self, samples, objective, step)
        with torch.no_grad():
            self.plain.get_parameter(BROKEN).fill_(torch.inf)
        return metrics

    monkeypatch.setattr(Student, "update", breaking)
    settings = distillation(tmp_path / "run", folder, sampling__engine=engine)
    error = refusal(capsys, "distill", settings, "logits for token 1 of a completion are not finite", "lower optim.lr")
    assert "Traceback" not in error
