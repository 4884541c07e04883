"""Runs that were made: their logs without the times, whether two are the same, and an end that comes too early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from run_settings import arguments
from safetensors.torch import load_file
from tiny_data import read_jsonl
from torch import Tensor

from fastkl import cli
from fastkl.trainer.distill import OnPolicy

PEERS = {"ddp": False, "fsdp": True}


def fresh_accelerate() -> None:
    """accelerate keeps one mixed precision per process."""
    AcceleratorState._reset_state(reset_partial_state=True)


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"}


def log(run: Path) -> list[dict[str, Any]]:
    return [untimed(row) for row in read_jsonl(run / "metrics.jsonl")]


def first_moments(run: Path) -> list[Tensor]:
    """Adam's running mean of the gradients, of every trained parameter: what the updates were made of."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    state = torch.load(checkpoint / "optimizer.bin", weights_only=False)["state"]
    return [state[index]["exp_avg"] for index in sorted(state)]


def check_equal(run: Path, whole: Path) -> None:
    """Exactly: the same bits in the same order, but for the times."""
    assert log(run) == log(whole)
    assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    check_same_weights(run, whole)


def check_same_weights(run: Path, whole: Path) -> None:
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def interrupt(monkeypatch: pytest.MonkeyPatch, run: dict[str, object], step: int) -> None:
    """Ctrl-C in a step, counted from 0."""
    samples = OnPolicy.samples

    def interrupted(self: OnPolicy, at: int, *args: Any) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return samples(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OnPolicy, "samples", interrupted)
        assert cli.main(arguments("distill", run)) == 130


def check_same(found: Path, wanted: Path, tolerance: float = 2e-4) -> None:
    """To float tolerance: sums are taken in another order."""
    for ours, theirs in zip(log(found), log(wanted), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-5)
    ours, theirs = read_jsonl(found / "samples.jsonl"), read_jsonl(wanted / "samples.jsonl")
    assert [row["ids"] for row in ours] == [row["ids"] for row in theirs]
    # Ranks while the weights are the same: later, neighbours may change places.
    for name in ("student_ranks", "teacher_ranks"):
        assert [row[name] for row in ours if row["step"] == 1] == [row[name] for row in theirs if row["step"] == 1]
        assert any(any(row[name]) for row in ours if row["step"] == 1)
    for name in [path.relative_to(wanted) for path in wanted.glob("student/**/*.safetensors")]:
        weights, same = load_file(found / name), load_file(wanted / name)
        assert weights.keys() == same.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight, same[key], atol=tolerance, rtol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )
