"""The bench of trainers with fastkl under them: who takes a step when, and what is said of it. Never how fast."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_cases import bench_refusal

from bench.__main__ import main
from bench.commands import integrations
from bench.integrations import WAYS, Job, load
from bench.integrations.process import run
from bench.lib.pair import Size, make_pair


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("integrations")
    make_pair(folder / "pair", Size(300, 64, 1))
    return Job("transformers", str(folder / "pair"), str(folder), list(WAYS), 6, rows=4, tokens=8, clock="cpu")


def losses(result: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in result["log"] if "loss" in entry]


def test_the_ways_take_turns(job: Job) -> None:
    result = run(job)
    ways = [step["way"] for step in result["steps"]]
    assert ways == ["theirs", "fastkl", "none", "fastkl", "none", "theirs"]
    assert all(step["seconds"] > 0 for step in result["steps"])
    assert [loss == 0 for loss in losses(result)] == [way == "none" for way in ways]
    assert result["extra_mb"] >= 0


def test_a_trainer_without_and_with(job: Job) -> None:
    theirs, ours = (run(replace(job, ways=[way], steps=3))["log"] for way in ("theirs", "fastkl"))
    assert 0 < integrations.difference(theirs, ours) < 1e-5
    assert not any("time" in key for entry in theirs for key in entry)


@pytest.mark.parametrize("kind", [name for name in integrations.NAMES if name != "transformers"])
def test_trls_trainers(kind: str, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", minversion="1.16")
    places = load(kind)
    result = run(replace(job, kind=kind))
    assert [step["way"] for step in result["steps"]] == ["theirs", "fastkl", "none", "fastkl", "none", "theirs"]
    gradients = [entry["grad_norm"] for entry in result["log"] if "grad_norm" in entry]
    assert [gradient == 0 for gradient in gradients] == [False, False, True, False, True, False]
    with places.within("none"):
        from trl.trainer import utils

        assert utils._ChunkedLogProbFunction.__module__ == "bench.integrations.trl_trainers"
    assert utils._ChunkedLogProbFunction.__module__.startswith("trl.")


def test_logs_differ() -> None:
    assert integrations.difference([{"loss": 2.0, "entropy": 0.5}], [{"loss": 2.5, "entropy": 0.6}]) == 0.25
    assert integrations.difference([{"loss": 2.0}], [{"loss": 2.0, "entropy": 0.5}]) == math.inf
    assert integrations.difference([{"loss": 2.0}], []) == math.inf


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, with the processes left out."""
    seconds = {"theirs": 4.0, "fastkl": 2.0, "none": 1.0}
    jobs: list[Job] = []

    def process(job: Job) -> dict[str, Any]:
        jobs.append(job)
        if job.kind == "kto":
            raise RuntimeError("no such package")
        gradient = float(job.kind != "grpo")
        turns = [{"way": way, "seconds": 99.0 if step == 0 else seconds[way]} for step in range(4) for way in job.ways]
        return {
            "steps": turns,
            "extra_mb": 10.0 * len(job.ways[0]),
            "log": [{"loss": 1.0 + (job.ways == ["fastkl"]), "grad_norm": gradient}],
        }

    monkeypatch.setattr(integrations, "_process", process)
    file = tmp_path / "report.json"
    main(["integrations", "--small", "--impl", "sft,kto,grpo", "--clock", "cpu", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["trainers"]["kto"] == {"skipped": "no such package"}
    assert "gradient of the trainer as it comes is 0" in report["trainers"]["grpo"]["skipped"]
    sft = report["trainers"]["sft"]
    assert (sft["seconds"], sft["head_share"], sft["difference"]) == (seconds, 0.75, 1.0)
    assert sft["extra_mb"] == {"theirs": 60.0, "fastkl": 60.0}
    assert sft["losses"] == {"theirs": [1.0], "fastkl": [2.0]}
    assert report["job"] == {"rows": 8, "tokens": 64, "clock": "cpu", "rounds": 3}
    assert [(job.ways, job.steps) for job in jobs[:3]] == [(list(WAYS), 12), (["theirs"], 2), (["fastkl"], 2)]
    said = capsys.readouterr().out
    assert "sft: 4.00 s a step, 2.00 with fastkl: 2.00 times as fast; the head takes 75%" in said
    assert "kto: skipped: no such package" in said


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    words = ["--small", "--impl", "transformers", "--rows", "4", "--tokens", "8", "--rounds", "1"]
    main(["integrations", *words, "--json", str(file)])
    assert json.loads(file.read_text())["trainers"]["transformers"]["difference"] < 1e-5


def test_every_name_is_known() -> None:
    pytest.importorskip("trl", minversion="1.16")
    assert all(load(name) for name in integrations.NAMES)


def test_bad_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rows: 6 is no multiple of 4" in bench_refusal(capsys, "integrations", "--rows", "6")
