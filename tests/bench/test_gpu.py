"""`make gpu` without a GPU: how stages are run, what becomes of one that fails, and the benches that it adds."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import bench_refusal

from bench import peers
from bench.__main__ import main
from bench.commands import count, gpu, loss, models
from bench.lib.stages import Outcome, Stage, run_stages, table


def python(name: str, code: str, budget: float = 30.0, **options: Any) -> Stage:
    return Stage(name, [sys.executable, "-S", "-c", code], budget, **options)


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    outcomes = run_stages(
        [
            python("first", "print('one'); raise SystemExit('broken')"),
            Stage("second", ["/no/such/program"], 1),
            python("third", "print('never')", skip="no device"),
            python("fourth", "import os; print('two'); print(os.environ['GIVEN'])", environment={"GIVEN": "three"}),
        ],
        tmp_path,
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "skipped", "ok"]
    assert [outcome.detail for outcome in outcomes[::2]] == ["broken", "no device"]
    assert "No such file" in outcomes[1].detail
    assert outcomes[3].detail == "three"
    assert (tmp_path / "first.log").read_text() == "one\nbroken\n"
    assert not (tmp_path / "third.log").exists()


def test_a_stage_ends_with_its_budget_and_so_do_its_children(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.perf_counter()
    (outcome,) = run_stages([python("slow", code, budget=1.0)], tmp_path)
    assert outcome.status == "out of time"
    assert time.perf_counter() - start < 20
    time.sleep(0.2)
    state = Path(f"/proc/{outcome.detail}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_tool_that_refuses_the_device_is_skipped(tmp_path: Path) -> None:
    (outcome,) = run_stages([python("tool", "raise SystemExit('Device not ready')", refusal="Device not")], tmp_path)
    assert (outcome.status, outcome.detail) == ("skipped", "Device not")


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_stages([python("stage", "print('a\\nb\\nc')", show=2)], tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == ["b", "c"]
    text = table([Outcome("tests", "ok", 61.7, "9 passed"), Outcome("memcheck", "skipped", 0.0, "none")])
    assert text == "tests     ok              62 s  9 passed\nmemcheck  skipped          0 s  none"


def stages(tmp_path: Path, **options: Any) -> dict[str, Stage]:
    arguments = {"dry_run": False, "wheels": None, "pair": None, **options}
    return {stage.name: stage for stage in gpu._stages(SimpleNamespace(**arguments), tmp_path, "/site")}


def test_the_stages_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    found = stages(tmp_path)
    assert list(found) == ["tests", "memcheck", "losses", "train"]
    assert sum(stage.budget for stage in found.values()) <= 8 * 60
    assert not any(stage.skip for stage in found.values())
    assert all(Path(path).is_file() for path in found["tests"].command if path.endswith(".py"))
    for stage in found.values():
        assert stage.environment["PYTHONPATH"].split(os.pathsep)[0] == "/site"
        assert stage.environment["FASTKL_DRY_RUN"] == "0"


def test_without_a_sanitizer_memcheck_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert stages(tmp_path)["memcheck"].skip == "no compute-sanitizer here"
    assert stages(tmp_path, dry_run=True)["memcheck"].skip == "a dry run has no device"


def test_wheels_go_where_the_other_stages_look(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("greeting.py", "print('hello')\n")
        wheel.writestr("greeting-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        wheel.writestr("greeting-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("greeting-1.0.dist-info/RECORD", "")
    arguments = SimpleNamespace(dry_run=True, wheels=wheels, pair=None)
    install, *others = gpu._stages(arguments, tmp_path, str(site))
    use = Stage("use", [sys.executable, "-c", "import greeting"], 30, others[0].environment)
    assert [outcome.detail for outcome in run_stages([install, use], tmp_path)][1] == "hello"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--out", "x"], "torch sees no CUDA device here; use --dry-run"),
        (["gpu", "--out", "x", "--wheels", "/no/such"], "--wheels: no *.whl in /no/such"),
        (["train"], "--device: torch sees no CUDA device here; use --device cpu"),
        (
            ["train", "--device", "cpu", "--impl", "none"],
            "--impl: unknown trainer 'none'; use some of fastkl, fastkl_bf16_sampling, fastkl_continuous_batching, fastkl_",
        ),
        (["train", "--device", "cpu", "--steps", "1"], "--steps: 1 is too few"),
    ],
)
def test_bad_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in bench_refusal(capsys, *arguments)


def test_summary_and_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two(*_: object) -> list[Stage]:
        return [python("good", "print('fine')"), python("bad", "raise SystemExit('broken')")]

    monkeypatch.setattr(gpu, "_stages", two)
    with pytest.raises(SystemExit) as stopped:
        main(["gpu", "--dry-run", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["ok", "failed"]
    assert {"torch", "triton"} <= summary["versions"].keys()
    assert capsys.readouterr().out.splitlines()[-1].endswith("broken")


class TestModels:
    """Every loss and head on a small shape."""

    def measure(self, tmp_path: Path, *options: str) -> dict[str, Any]:
        file = tmp_path / "losses.json"
        small = ["--device", "cpu", "--small", "--repeats", "1", "--impl", "fastkl", "--json", str(file)]
        main(["models", *small, *options])
        return json.loads(file.read_text())

    def test_reports(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = self.measure(tmp_path)
        cases = {(row["op"], row["head"]) for report in found["reports"] for row in report["rows"]}
        assert len(cases) == len(found["reports"]) == 6
        assert found["missing"] == []
        assert capsys.readouterr().out.splitlines()[-1] == "6 cases, 0 failed, 0 left out for lack of time"

    def test_what_fails_is_named_and_the_rest_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = loss.run

        def run(arguments: Any, parser: Any) -> dict[str, Any]:
            if arguments.op == "reverse_kl":
                raise RuntimeError("no kernel image")
            return original(arguments, parser)

        monkeypatch.setattr(loss, "run", run)
        with pytest.raises(SystemExit):
            self.measure(tmp_path)
        found = json.loads((tmp_path / "losses.json").read_text())
        assert len(found["reports"]) == 4
        assert [entry["reason"] for entry in found["missing"]] == ["RuntimeError: no kernel image"] * 2

    def test_no_case_is_started_when_the_time_is_up(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.measure(tmp_path, "--seconds", "0")
        assert "0 cases, 0 failed, 6 left out for lack of time" in capsys.readouterr().out

    def test_ours_come_first_and_then_everyone(self) -> None:
        first, second = models.rounds(None)
        assert {*first, *second, "compile"} == {*peers.names()}
        todo = list(models.jobs(count.SHAPES, [first, second]))
        assert [job.shape for job in todo[::6]] == 2 * list(count.SHAPES.values())
        assert [list(todo[0].impl), list(todo[-1].impl)] == [first, second]


def test_train(tmp_path: Path) -> None:
    """A generated pair, the command `fastkl distill`, and what is read off the run."""
    file = tmp_path / "train.json"
    main(["train", "--small", "--device", "cpu", "--json", str(file)])
    report = json.loads(file.read_text())
    measured = report["trainers"]["fastkl"]
    assert measured["peak_memory_mb"] > 10
    assert len(measured["steps"]) == report["job"]["steps"] == 3
    for step in [*measured["steps"], measured["seconds"]]:
        assert step["total"] > step["sample"] > 0
        assert step["total"] > step["teacher"] > 0
        assert step["train"] > 0
    assert report["pair"] == "generated"
