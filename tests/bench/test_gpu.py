"""`make gpu` without a GPU: how stages are run, what becomes of one that fails, and the benches that it adds."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import bench_refusal

from bench import peers
from bench.__main__ import main
from bench.commands import count, gpu, loss, models
from bench.lib.stages import SECONDS, Outcome, Stage, run_stages, table


def python(name: str, code: str, budget: float = 30.0, more: Sequence[str] = ("",), **options: Any) -> Stage:
    return Stage(name, [sys.executable, "-S", "-c", code, *more], budget, **options)


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
    first, *others = (tmp_path / "log.txt").read_text().split("\n=== ")[1:]
    assert first.startswith("first, at most 30 s: ")
    assert first.endswith("\none\nbroken\n")
    assert [text.split(",")[0] for text in others] == ["second", "fourth"]


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


def test_what_a_stage_leaves_is_the_next_ones(tmp_path: Path) -> None:
    wait = "import sys, time; print(sys.argv[1]); time.sleep({})"
    outcomes = run_stages(
        [
            python("quick", wait.format(0), 4.0),
            python("late", wait.format(60), 0.5, more=[SECONDS]),
            python("last", wait.format(0), 20.0, more=[SECONDS]),
        ],
        tmp_path,
    )
    assert [outcome.status for outcome in outcomes] == ["ok", "out of time", "ok"]
    assert 1 < outcomes[1].seconds < 4.5 + 1
    assert int(outcomes[1].detail) == round(0.9 * (4.5 - outcomes[0].seconds))
    assert 16 <= int(outcomes[2].detail) <= 18  # nobody makes up for what was late


def test_what_came_of_each_stage_is_known_at_once(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    two = [python("one", "print(1)"), python("two", "print(2)")]
    run_stages(two, tmp_path, lambda outcomes: seen.append([outcome.status for outcome in outcomes]))
    assert seen == [["running"], ["ok"], ["ok", "running"], ["ok", "ok"]]


def stages(tmp_path: Path, **options: Any) -> dict[str, Stage]:
    arguments = {"dry_run": False, "wheels": None, "pair": None, "cache": None, **options}
    return {stage.name: stage for stage in gpu._stages(argparse.Namespace(**arguments), tmp_path, tmp_path / "scratch")}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu, "cores", lambda: 16)


@pytest.mark.usefixtures("a_gpu")
def test_the_stages_fit_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    found = stages(tmp_path, cache=tmp_path)
    assert list(found) == ["smoke", "losses", "train", "tests", "memcheck"]
    assert sum(stage.budget for stage in found.values()) == 8 * 60
    assert found["smoke"].budget <= 60
    assert not any(stage.skip for stage in found.values())
    assert all(Path(path).is_file() for path in found["tests"].command if path.endswith(".py"))
    assert found["tests"].command[found["tests"].command.index("--numprocesses") + 1] == "6"
    for stage in found.values():
        assert stage.environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "scratch" / "site")
        assert stage.environment["FASTKL_DRY_RUN"] == "0"
        assert stage.environment["TRITON_CACHE_DIR"] == str(tmp_path / "scratch" / "triton")
    assert "TRITON_CACHE_DIR" not in stages(tmp_path)["smoke"].environment


@pytest.mark.usefixtures("a_gpu")
def test_without_a_sanitizer_memcheck_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert stages(tmp_path)["memcheck"].skip == "no compute-sanitizer here"
    assert stages(tmp_path, dry_run=True)["memcheck"].skip == "a dry run has no device"


def test_wheels_go_where_the_other_stages_look(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "greeting-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("greeting.py", "print('hello')\n")
        wheel.writestr("greeting-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        wheel.writestr("greeting-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("greeting-1.0.dist-info/RECORD", "")
    install, *others = stages(tmp_path, dry_run=True, wheels=wheels).values()
    use = Stage("use", [sys.executable, "-c", "import greeting"], 30, others[0].environment)
    assert [outcome.detail for outcome in run_stages([install, use], tmp_path)][1] == "hello"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu", "--out", "x"], "torch sees no CUDA device here; use --dry-run"),
        (["gpu", "--out", "x", "--wheels", "/no/such"], "--wheels: no *.whl in /no/such"),
        (["gpu", "--out", "x", "--cache", "/no/such"], "--cache: no kernels.json in /no/such"),
        (["gpu"], "argument --out: it is missing; name a folder"),
        (
            ["gpu", "--make-cache", "x", "--arch", "sm_75"],
            "--arch: unknown chip 'sm_75'; use one of sm_80, sm_90, sm_",
        ),
        (["gpu", "--make-cache", str(Path(__file__).parent)], "is not empty; name a new folder"),
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


NO_DEVICE = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def descendants(process: int) -> Iterator[int]:
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def cut_off(folder: Path, stage: str, enough: str) -> dict[str, Any]:
    """Kills a dry run, and all that it started, as soon as a stage's JSON contains a text; the JSON in the folder."""
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--out", str(folder)]
    root = Path(__file__).parents[2]
    running = subprocess.Popen(command, cwd=root, env=NO_DEVICE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = folder / f"{stage}.json"
    while not file.exists() or enough not in file.read_text():
        assert running.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.01)
    for process in [running.pid, *descendants(running.pid)]:
        os.kill(process, signal.SIGKILL)
    running.wait()
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "enough"),
    [
        ("smoke", '"top_k.tail_sums"'),
        ("losses", '"policy_gradient"'),
        ("train", '"steps": ['),
        ("tests", '"passed": 2'),
    ],
)
def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path: Path, stage: str, enough: str) -> None:
    """The whole dry run, killed in the middle of each stage."""
    found = cut_off(tmp_path, stage, enough)
    order = ["smoke", "losses", "train", "tests"]
    before, after = order[: order.index(stage)], order[order.index(stage) + 1 :]
    statuses = {one["stage"]: one["status"] for one in found["summary"]["stages"]}
    assert statuses == {**dict.fromkeys(before, "ok"), stage: "running"}
    assert not found.keys() & {*after}
    if stage == "smoke":
        assert not found["smoke"]["complete"]
        assert all(one["ok"] for one in found["smoke"]["checks"])
    else:
        assert found["smoke"]["complete"]
    if stage == "losses":
        assert 1 < len(found["losses"]["reports"]) < 12
    if stage == "train":
        assert found["train"]["trainers"]["fastkl"]["steps"]
    if stage == "tests":
        assert not found["tests"]["complete"]


def test_tests_are_recorded_as_they_end(tmp_path: Path) -> None:
    """In workers, too; a process that dies in the middle leaves what had ended."""
    (tmp_path / "test_these.py").write_text(
        "import os, pytest\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'no'\n"
        "@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_d(broken): pass\n"
        "def test_e():\n    if 'DIE' in os.environ: os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.lib.pytest_record", "-c", "/dev/null", str(tmp_path)]
    file = tmp_path / "tests.json"
    for more, complete, passed in ((["-p", "no:xdist"], False, 1), (["-n1"], True, 2)):
        file.unlink(missing_ok=True)
        environment = {
            **NO_DEVICE,
            "BENCH_TESTS_JSON": str(file),
            "PYTHONPATH": str(root),
            **({} if complete else {"DIE": "1"}),
        }
        subprocess.run([*command, *more], env=environment, cwd=tmp_path, check=False, stdout=subprocess.DEVNULL)
        found = json.loads(file.read_text())
        assert (found["complete"], found["passed"], found["failed"], found["skipped"]) == (complete, passed, 2, 1)
        assert [one["test"].rpartition("::")[2] for one in found["failures"]] == ["test_b", "test_d"]
        assert "ValueError: broken" in found["failures"][1]["error"]


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
        monkeypatch.setattr(models, "OPS", ("reverse_kl", "logprobs"))
        with pytest.raises(SystemExit):
            self.measure(tmp_path)
        found = json.loads((tmp_path / "losses.json").read_text())
        assert len(found["reports"]) == 2
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
