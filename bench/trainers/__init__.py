"""The trainers under test: ours and other people's. One file each, imported only in the process that measures it.

A file `<name>.py` in this folder is what `bench train --impl <name>` measures. It holds `PACKAGES`, the distributions whose
versions belong into a report, and `train(job, clock)`, which does `job.steps` steps of on-policy distillation: sample one
completion of exactly `job.new_tokens` tokens (no token ends it) to each prompt of the pair, score it by the teacher, one
optimizer step (AdamW) on all of them, in float32 unless the device is a GPU. It runs sampling and teacher under
`clock(phase)` and calls `clock.end_step()` after each step; the rest of a step is the phase "train".
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.lib.measure import CLOCKS

PHASES = ("sample", "teacher", "train")


@dataclasses.dataclass(frozen=True)
class Job:
    """The same work for everyone."""

    pair: str  # folder with teacher/, student/, and prompts.jsonl: exactly one step's prompts
    folder: str  # for whatever a trainer writes
    device: str
    prompts: int
    new_tokens: int
    steps: int
    clock: str  # of CLOCKS
    lr: float = 1e-5

    def messages(self) -> list[list[dict[str, str]]]:
        """The prompts as chats."""
        lines = Path(self.pair, "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]


class Clock:
    """Seconds of each step, from the end of the one before: in all, and by phase."""

    def __init__(self, kind: str) -> None:
        self._now = CLOCKS[kind]
        self.steps: list[dict[str, float]] = []
        self._phases: dict[str, float] = defaultdict(float)
        self._last = self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._phases[phase] += self._now() - start

    def end_step(self) -> None:
        now = self._now()
        total = now - self._last
        self.steps.append({"total": total, **self._phases, "train": total - sum(self._phases.values())})
        self._phases.clear()
        self._last = now


def names() -> list[str]:
    """What `--impl` can name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "process")


def load(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
