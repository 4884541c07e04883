"""Guards in runs: said, logged, in the report; a stop is as any other stop."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import give_samples, together
from run_cases import check_equal, check_same_weights, distilled, interrupt, refusal, tuned
from run_settings import MINIMAL, Settings, arguments, distillation, evaluated, training
from tiny_data import read_jsonl
from tiny_models import save_model
from transformers import AutoModelForCausalLM

from fastkl import cli
from fastkl.trainer import loop

STOP = {"guards__teacher_constant": "stop"}


@pytest.fixture(scope="module")
def flat(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair, but for a teacher whose head has lost its weights: all tokens are equally likely."""
    path = tmp_path_factory.mktemp("flat")
    shutil.copytree(folder / "student", path / "student")
    shutil.copy(folder / "sums.jsonl", path)
    save_model(path / "teacher", tie_word_embeddings=False)
    teacher = AutoModelForCausalLM.from_pretrained(path / "teacher")
    torch.nn.init.zeros_(teacher.get_output_embeddings().weight)
    teacher.save_pretrained(path / "teacher")
    return path


def test_a_stop_leaves_a_checkpoint_from_which_a_run_goes_on(
    tmp_path: Path, flat: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = distilled(distillation(tmp_path / "whole", flat))
    assert capfd.readouterr().err.count("guard teacher_constant: the teacher's log-probs are uniform") == 1
    stopped = distillation(tmp_path / "run", flat, **STOP)
    assert cli.main(arguments("distill", stopped)) == 3
    said = capfd.readouterr().err
    assert "goes on after step 1; with --guards.teacher_constant warn it does not stop for this again" in said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]
    assert cli.main(arguments("distill", stopped)) == 3  # one step more
    assert cli.main(arguments("distill", stopped | {"guards.teacher_constant": "warn"})) == 0
    check_equal(tmp_path / "run", whole)
    assert (tmp_path / "run/guards.jsonl").read_bytes() == (whole / "guards.jsonl").read_bytes()
    assert [row["step"] for row in read_jsonl(whole / "metrics.jsonl") if row.get("guards/teacher_constant")] == [
        1,
        2,
        3,
    ]
    assert "step 1: teacher_constant: the teacher's log-probs are uniform" in (whole / "report.html").read_text()


def test_the_last_step_is_no_place_to_stop(tmp_path: Path, flat: Path) -> None:
    run = distilled(distillation(tmp_path / "run", flat, optim__steps=1, **STOP))
    assert (run / "student/model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path, flat: Path) -> None:
    settings = arguments("distill", distillation(tmp_path / "run", flat, **STOP))
    codes, said = together(settings, tmp_path / "said", before=dict.fromkeys(range(2), give_samples))
    assert codes == [3, 3]
    assert sum("The run was stopped with a checkpoint" in each for each in said) == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distilled(distillation(tmp_path / "run", folder, optim__steps=1, teacher__path=folder / "student"))
    assert "guard nothing_to_learn: teacher_kl of the first step is" in capfd.readouterr().err


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What the first evaluations find; later ones find 0.2."""
    found, calls = {0: 0.1, 1: 0.3, 2: 0.7}, itertools.count()
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"eval/accuracy": found.get(next(calls), 0.2)})
    return found


def best(folder: Path, run: Path, command: str, **overrides: Any) -> Settings:
    options = {"optim__steps": 4, "checkpoint__best": "student", **evaluated(folder, eval__every=1), **overrides}
    return {"distill": distillation, "sft": training}[command](run, folder, **options)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("command", ["distill", "sft"])
def test_the_best_student_is_kept_and_saved(
    tmp_path: Path, folder: Path, accuracies: dict[int, float], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = best(folder, tmp_path / "run", command, **({"examples_per_step": 4} if command == "sft" else {}))
    interrupt(monkeypatch, run, 3, command)  # after the best
    made = {"distill": distilled, "sft": tuned}[command]
    made(run)
    assert checkpoints(tmp_path / "run") == ["step-000002", "step-000004"]
    short = run | {"run": tmp_path / "short", "optim.steps": 2, "checkpoint.best": "null", "eval.data.path": "null"}
    check_same_weights(tmp_path / "run", made(short))
    assert "| kept | the student after step 2," in (tmp_path / "run/student/README.md").read_text(encoding="utf-8")


def test_the_best_may_be_the_student_that_the_run_began_with(
    tmp_path: Path, folder: Path, accuracies: dict[int, float]
) -> None:
    accuracies[0] = 0.9
    distilled(best(folder, tmp_path / "run", "distill", optim__steps=2))
    assert checkpoints(tmp_path / "run") == ["step-000000", "step-000002"]
    ours, theirs = (
        dict(AutoModelForCausalLM.from_pretrained(p).named_parameters())
        for p in (tmp_path / "run/student", folder / "student")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_best_checkpoint_that_nobody_kept_is_said(
    tmp_path: Path, folder: Path, accuracies: dict[int, float], capfd: pytest.CaptureFixture[str]
) -> None:
    run = best(folder, tmp_path / "run", "distill", checkpoint__best="null")
    whole = distilled(run)
    distilled(run | {"checkpoint.best": "student"})
    assert "after step 2, whose checkpoint is not there: the last student is saved" in capfd.readouterr().err
    assert checkpoints(whole) == ["step-000004"]


def test_the_best_of_no_evaluation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    settings = MINIMAL["sft"] | {"checkpoint.best": "keep"}
    refusal(capsys, "sft", settings, "checkpoint.best is keep, but nothing is evaluated; set eval.data.path")
