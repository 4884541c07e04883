"""Other people's trainers, as they are and with fastkl under them: what `bench integrations` measures.

A file of this folder holds `KINDS`, by name; `process.py` runs one of them. All train the same random model in float32.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

FILES = ("transformers_trainer", "trl_trainers")
WAYS = ("theirs", "fastkl", "none")
PROMPT = 8  # words


@dataclasses.dataclass(frozen=True)
class Job:
    """The work of one run."""

    kind: str
    pair: str  # folder with teacher/ and student/
    folder: str  # for whatever a trainer writes
    ways: list[str]  # of WAYS; several take turns, a step each
    steps: int
    rows: int  # of a batch
    tokens: int  # that each row trains on
    clock: str

    @property
    def student(self) -> str:
        return f"{self.pair}/student"

    def arguments(self) -> dict[str, Any]:
        """Of Transformers' Trainer: a step takes all its rows in one forward pass."""
        return {
            "output_dir": self.folder,
            "per_device_train_batch_size": self.rows,
            "max_steps": self.steps,
            "learning_rate": 1e-4,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }

    def texts(self, words: int, vocabulary: int, count: int | None = None) -> list[str]:
        """Random words, a token each: enough rows for all steps unless there is a count."""
        rng = random.Random(words)
        number = self.rows * self.steps if count is None else count
        return [" ".join(f"w{rng.randrange(vocabulary - 2)}" for _ in range(words)) for _ in range(number)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A trainer. `fastkl` puts fastkl under it; `none` a head that costs nothing, to see what the head takes of a step."""

    build: Callable[[Job], Any]  # a Trainer of Transformers
    fastkl: Callable[[], AbstractContextManager[Any]]
    none: Callable[[], AbstractContextManager[Any]]

    def within(self, way: str) -> AbstractContextManager[Any]:
        return {"theirs": nullcontext, "fastkl": self.fastkl, "none": self.none}[way]()


def load(name: str) -> Kind:
    """Imports only what the trainer needs."""
    return next(kinds[name] for file in FILES if name in (kinds := importlib.import_module(f"{__name__}.{file}").KINDS))
