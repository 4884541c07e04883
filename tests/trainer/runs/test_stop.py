"""Runs that are told to stop: between two phases, with a checkpoint, and as if nothing had happened when they go on."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import CONTEXT, give_samples, run_python, together
from run_cases import check_equal, check_same, distilled
from run_settings import Settings, arguments, distillation, evaluated

from fastkl import cli
from fastkl.trainer import loop
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.student import Student
from fastkl.trainer.teachers.local import LocalTeacher

SIGNALS = {"ctrl-c": signal.SIGINT, "preemption": signal.SIGTERM}


def settings(folder: Path, run: Path) -> Settings:
    return distillation(run, folder, optim__steps=3, checkpoint__every=0, **evaluated(folder, eval__every=2))


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    return distilled(settings(folder, tmp_path_factory.mktemp("run") / "whole"))


def signalled(function: Callable[..., Any], number: int, call: int, times: int = 1) -> Callable[..., Any]:
    """The function; within its so-many-th call the process gets the signal."""
    calls = itertools.count(1)

    def wrapped(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return function(*args, **options)

    return wrapped


# function, which call of it, and the steps that are done then
MOMENTS: dict[str, tuple[object, str, int, int]] = {
    "evaluating-before-the-first-step": (loop, "evaluate", 1, 0),
    "sampling": (GenerateSampler, "sample", 3, 1),  # the first call evaluates
    "scoring": (LocalTeacher, "score", 2, 1),
    "updating": (Student, "update", 2, 2),
    "evaluating": (loop, "evaluate", 2, 2),
}


@pytest.mark.parametrize(("owner", "name", "call", "done"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_ends_a_run_after_the_phase(
    tmp_path: Path,
    folder: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    owner: object,
    name: str,
    call: int,
    done: int,
) -> None:
    number = SIGNALS["preemption" if call % 2 else "ctrl-c"]
    run, handlers = settings(folder, tmp_path / "run"), [signal.getsignal(s) for s in SIGNALS.values()]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled(getattr(owner, name), number, call))
        assert cli.main(arguments("distill", run)) == 128 + number
    said = capfd.readouterr().err
    assert "stopping after this phase" in said
    assert f"the same command goes on after step {done}" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06d}"]
    assert [signal.getsignal(s) for s in SIGNALS.values()] == handlers
    check_equal(distilled(run), whole)


def twice(command_line: list[str], number: int) -> None:
    GenerateSampler.sample = signalled(GenerateSampler.sample, number, 3, times=2)  # type: ignore[method-assign]
    cli.main(command_line)


@pytest.mark.parametrize("number", SIGNALS.values(), ids=SIGNALS)
def test_a_second_signal_ends_it_at_once(tmp_path: Path, folder: Path, number: int) -> None:
    command_line = arguments("distill", settings(folder, tmp_path / "run"))
    process = CONTEXT.Process(target=twice, args=(command_line, number))
    process.start()
    process.join()
    assert process.exitcode == -number
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def stop_in_the_second_update() -> None:
    give_samples()
    Student.update = signalled(Student.update, signal.SIGTERM, 2, times=2)  # type: ignore[method-assign]


def test_a_signal_to_one_process_stops_all(tmp_path: Path, folder: Path) -> None:
    """A launcher passes on what the process has had already: that is no second signal."""
    run = arguments("distill", settings(folder, tmp_path / "run"))
    before = {0: give_samples, 1: stop_in_the_second_update}
    codes, said = together(run, tmp_path / "stopped", before=before)
    assert codes == [143, 143], "\n".join(said)
    assert sum("the same command goes on after step 2" in text for text in said) == 1
    given = dict.fromkeys((0, 1), give_samples)
    assert together(run, tmp_path / "resumed", before=given)[0] == [0, 0]
    whole = arguments("distill", settings(folder, tmp_path / "whole"))
    assert together(whole, tmp_path / "errors", before=given)[0] == [0, 0]
    check_same(tmp_path / "run", tmp_path / "whole")


def test_before_the_steps_a_signal_ends_it_in_one_line() -> None:
    code = """import os, signal, time
from fastkl import cli
with cli._ended_at_once(signal.SIGTERM, cli.TERMINATED):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)"""
    done = run_python(code)
    assert done.returncode == 143
    assert done.stderr.splitlines() == [cli.TERMINATED]
