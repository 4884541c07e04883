"""A student and a teacher so small that every number can be computed once more by hand, and a run of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from run_settings import config, distillation
from tiny_data import read_jsonl, sums, write_jsonl
from tiny_models import save_model, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastkl.trainer.distill import distill

WORDS = len(tokenizer())


class Pair(NamedTuple):
    student: Path
    teacher: Path
    data: Path


def make_pair(folder: Path) -> Pair:
    """Heads padded to different sizes, as they are in real families; data with an answer per row."""
    return Pair(
        save_model(folder / "student", vocabulary=WORDS + 8),
        save_model(folder / "teacher", vocabulary=WORDS + 3, seed=1, width=24, tie_word_embeddings=False),
        write_jsonl(folder / "sums.jsonl", sums()),
    )


class Run(NamedTuple):
    folder: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def weights(self) -> dict[str, Tensor]:
        return weights(self.folder / "student")


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def run(folder: Path, pair: Pair, **overrides: object) -> Run:
    path = distill(config("distill", distillation(folder, *pair, **overrides))).path
    return Run(path, read_jsonl(path / "metrics.jsonl"), read_jsonl(path / "samples.jsonl"))


def counted(sample: dict[str, Any], field: str) -> list[float]:
    return list(itertools.compress(sample[field], sample["loss_mask"]))
