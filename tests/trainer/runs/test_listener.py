"""Callbacks of a run: which come, in which order, and with what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_cases import tuned
from run_settings import config, distillation, evaluated, training
from tiny_data import read_jsonl

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.distill import distill
from fastkl.trainer.runs.folder import RunFolder
from fastkl.trainer.runs.listener import Listener
from fastkl.trainer.sft import sft


class Diary(Listener):
    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.rows: list[dict[str, Any]] = []

    def on_start(self, steps_done: int, steps: int) -> None:
        self.entries.append((steps_done, steps))

    @contextmanager
    def on_phase(self, phase: str) -> Iterator[None]:
        self.entries.append(f"{phase} begins")
        yield
        self.entries.append(f"{phase} ends")

    def on_step(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        self.entries.append((step, len(samples)))
        self.rows.append({"step": step, **metrics})

    def on_end(self, folder: RunFolder) -> None:
        self.entries.append(folder.student.name)


def test_a_listener_hears_phases_steps_and_the_end(folder: Path, tmp_path: Path) -> None:
    diary = Diary()
    run = distillation(tmp_path / "run", folder, **evaluated(folder, eval__max_new_tokens=8, optim__steps=1))
    path = distill(config("distill", run), listener=diary).path
    phases = [
        f"{phase} {what}" for phase in ("sample", "teacher", "old_logprobs", "ranks") for what in ("begins", "ends")
    ]
    assert diary.entries == [(0, 1), (0, 0), *phases, "train begins", "train ends", (1, 6), "student"]
    assert diary.rows == read_jsonl(path / "metrics.jsonl")


def test_a_resumed_run_says_where_it_goes_on(folder: Path, tmp_path: Path) -> None:
    run = training(tmp_path / "run", folder, optim__steps=1)
    tuned(run)
    diary = Diary()
    sft(config("sft", run), listener=diary)
    assert diary.entries == [(1, 1), "student"]


def test_what_a_listener_raises_ends_the_run(folder: Path, tmp_path: Path) -> None:
    class Stops(Listener):
        def on_step(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        distill(config("distill", distillation(tmp_path / "run", folder)), listener=Stops())
