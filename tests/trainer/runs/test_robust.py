"""What goes wrong around a run: a full disk, numbers that are not finite, completions that are empty."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import check_same_weights, distilled, log, refusal
from run_settings import arguments, distillation

from fastkl import cli
from fastkl.trainer.distill import OnPolicy
from fastkl.trainer.rollouts.samplers.generate import GenerateSampler
from fastkl.trainer.runs import checkpoint
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.student import Student


def settings(folder: Path, run: Path, **overrides: object) -> dict[str, object]:
    options: dict[str, object] = {"optim__steps": 5, "checkpoint__every": 2, **overrides}
    return distillation(run, folder, **options)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happened."""
    return distilled(settings(folder, tmp_path_factory.mktemp("run") / "whole"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=False).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path, leaving: int) -> None:
    """Takes all the room there is but so many bytes."""
    status = os.statvfs(path)
    with open(path / "filler", "wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - leaving)))
        file.flush()


def fails_once_then_resumes(
    run: dict[str, object], whole: Path, mend: Callable[[], None], said: pytest.CaptureFixture[str]
) -> str:
    path = Path(str(run["run"]))
    error = refusal(said, "distill", run)
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-000002"]
    mend()
    assert cli.main(arguments("distill", run)) == 0
    assert f"resumed {path} after step 2" in said.readouterr().err
    assert log(path) == log(whole)
    check_same_weights(path, whole)
    return error


@pytest.mark.parametrize(
    ("where", "leaving"), [("log", 0), ("checkpoint", 0), ("checkpoint", 8192), ("checkpoint", 20480)]
)
def test_a_full_disk(
    folder: Path,
    whole: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    leaving: int,
) -> None:
    save, update = RunFolder.save_checkpoint, Student.update

    def full_then_save(self: RunFolder, write: Any, done: int, best: int | None = None) -> None:
        if done == 4 and where == "checkpoint":
            fill(small_disk, leaving)
        save(self, write, done, best)

    def update_then_full(self: Student, samples: Any, objective: Any, step: int) -> Any:
        metrics = update(self, samples, objective, step)
        if step == 3 and where == "log":
            with open(small_disk / "run" / "metrics.jsonl", "ab") as log:  # its last block has no room either
                log.write(b"\n" * (-log.tell() % 4096))
            fill(small_disk, leaving)
        return metrics

    def mend() -> None:
        monkeypatch.undo()
        (small_disk / "filler").unlink()

    if where == "log":
        monkeypatch.setattr(Student, "update", update_then_full)
    else:
        monkeypatch.setattr(RunFolder, "save_checkpoint", full_then_save)
    error = fails_once_then_resumes(settings(folder, small_disk / "run", log_samples=1), whole, mend, capfd)
    assert "could not be written" in error
    assert "make room" in error


@pytest.mark.parametrize("function", ["save_file", "torch.save"])
def test_a_write_that_fails(
    tmp_path: Path,
    folder: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    function: str,
) -> None:
    """As torch and safetensors fail on a disk that is full, where nobody may mount one."""
    owner, name = (checkpoint, function) if "." not in function else (torch, "save")
    write, calls = getattr(owner, name), []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == (2 if name == "save_file" else 3):  # one or two a checkpoint
            no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise no_space if name == "save_file" else RuntimeError("unexpected pos")
        write(*args)

    monkeypatch.setattr(owner, name, failing)
    error = fails_once_then_resumes(settings(folder, tmp_path / "run", log_samples=1), whole, monkeypatch.undo, capsys)
    assert "fastkl: step-000004 could not be written in" in error


def spoil(monkeypatch: pytest.MonkeyPatch, bad_steps: set[int], value: float) -> None:
    samples = OnPolicy.samples

    def spoiled(self: OnPolicy, step: int, *args: Any) -> Any:
        found, metrics = samples(self, step, *args)
        if step in bad_steps:
            found[0].advantages = [value if counted else 0.0 for counted in found[0].loss_mask]
        return found, metrics

    monkeypatch.setattr(OnPolicy, "samples", spoiled)


@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
def test_a_step_without_a_finite_gradient_is_skipped(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    short = distilled(settings(folder, tmp_path / "short", optim__steps=1))
    spoil(monkeypatch, {1, 2}, value)
    options = {"optim__steps": 3, "optim__max_skipped": 3}
    path = distilled(settings(folder, tmp_path / "run", **options))
    assert [row["optim/skipped"] for row in log(path)] == [0, 1, 1]
    check_same_weights(path, short)


def test_a_run_that_skipped_every_step_does_not_end_well(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor when it is started again."""
    spoil(monkeypatch, {0, 1}, math.nan)
    run = settings(folder, tmp_path / "run", optim__steps=2, optim__substeps=1)
    for _ in range(2):
        refusal(capsys, "distill", run, "2 of 2 optimizer steps were skipped", "nothing was learned", "lower optim.lr")
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(("bad", "ends_in"), [({1, 2, 3}, 3), ({1, 3, 4}, None)], ids=["in-a-row", "with-a-break"])
def test_too_many_skips_in_a_row_end_a_run(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad: set[int],
    ends_in: int | None,
) -> None:
    spoil(monkeypatch, bad, math.nan)
    code = cli.main(arguments("distill", settings(folder, tmp_path / "run", optim__max_skipped=3)))
    assert code == (0 if ends_in is None else 2)
    said = "3 of 5 optimizer steps were skipped, because their gradient was not finite"
    assert (said in (error := capsys.readouterr().err)) == (ends_in is None)
    if ends_in is not None:
        assert "not finite for the last 3 optimizer steps" in error
        assert [row["step"] for row in log(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("every", [1, 2], ids=["all", "some"])
def test_empty_completions(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """An end of sequence at once is one token; a completion of no token at all is no reason to stop either."""
    sample = GenerateSampler.sample

    def emptied(self: Any, prompts: Any, **options: Any) -> Any:
        found = sample(self, prompts, **options)
        return [c._replace(token_ids=[], logprobs=[]) if i % every == 0 else c for i, c in enumerate(found)]

    monkeypatch.setattr(GenerateSampler, "sample", emptied)
    options = {"optim__steps": 2, "optim__substeps": 2, "batch__max_tokens": 1, "loss__old_logprobs": "recompute"}
    path = distilled(settings(folder, tmp_path / "run", **options))
    for row in log(path):
        assert all(math.isfinite(value) for value in row.values())
        assert (row["completions/mean_length"] == 0) == (every == 1)
        assert row["optim/skipped"] == 0
