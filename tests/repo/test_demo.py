"""The demo: its data give nothing away, and (slow) it does what the README says, by distillation and nothing else."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("arithmetic")


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_data(arithmetic: ModuleType, tmp_path: Path) -> None:
    arithmetic.write_data(tmp_path)
    train, sloppy, heldout = (rows(tmp_path / f"{name}.jsonl") for name in ("train", "sloppy", "heldout"))
    assert len(heldout) >= 500
    assert not {row["prompt"] for row in heldout} & {row["prompt"] for row in train + sloppy}
    for row in train:
        expression = row["prompt"].removeprefix(arithmetic.INSTRUCTION).removesuffix("=")
        assert eval(expression) == int(row["answer"])
        assert row["completion"].split()[-1] == row["answer"]
    right = {row["prompt"]: row["completion"] for row in train}
    wrong = sum(row["completion"] != right[row["prompt"]] for row in sloppy) / len(sloppy)
    assert 0.7 < wrong < 0.8  # two totals, each off by one half of the time


def test_tokenizer_keeps_every_text(arithmetic: ModuleType, tmp_path: Path) -> None:
    arithmetic.write_data(tmp_path)
    tokenizer = arithmetic._tokenizer()
    for row in rows(tmp_path / "train.jsonl")[:200]:
        for text in (row["prompt"], row["completion"]):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_demo_holds_its_bar_and_learns_from_the_teacher_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "run.py"], cwd=tmp_path, check=True)
    summary = json.loads((tmp_path / "runs/demo/summary.json").read_text())
    assert summary["held_out_problems"] >= 500
    assert summary["teacher_accuracy"] >= 0.9
    assert summary["student_accuracy_before"] <= 0.5
    assert summary["student_accuracy_after"] >= summary["teacher_accuracy"] - 0.05
    assert not [*tmp_path.rglob("guards.jsonl")]
    assert summary["teacher_kl_last"] < summary["teacher_kl_first"] / 2

    # The same run with all advantages 0 (a reward that is 1 for all): the rise is the teacher's doing.
    command = [
        "distill",
        str(DEMO / "distill.yaml"),
        "--run",
        "runs/zero",
        "--loss.kl_coef",
        "0",
        "--reward.grader",
        "regex:$",
        "--sampling.samples_per_prompt",
        "2",
        "--optim.steps",
        "25",
    ]
    subprocess.run([sys.executable, "-m", "fastkl.cli", *command], cwd=tmp_path, check=True)
    accuracies = [row["eval/accuracy"] for row in rows(tmp_path / "runs/zero/metrics.jsonl") if "eval/accuracy" in row]
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1] == summary["student_accuracy_before"]
