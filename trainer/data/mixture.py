"""Several data sets in one run: which rows a step gets, a pure function of seed and step."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.mixture import DataSetConfig, TaughtConfig
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.data.arrays import Array, end_to_end
from fastkl.trainer.data.formats.packed import EndToEnd
from fastkl.trainer.data.order import rows_at
from fastkl.trainer.data.prompts import EncodedPrompt, Given, Prompts, encode_prompts, given_samples
from fastkl.trainer.data.sources import load_prompts


@dataclass(frozen=True)
class DataSet:
    """Prompts with what the config says of them; the name is "" where there is one data set alone."""

    name: str
    config: DataSetConfig  # of a distillation, `TaughtConfig`
    prompts: Prompts
    given: Given | None = None  # its own completions, where a step has some of them

    @property
    def teacher(self) -> TeacherConfig:
        """The one that scores, whatever it reads."""
        return self._taught_by.scorer

    @property
    def context(self) -> ContextConfig:
        """What its teacher reads."""
        return self._taught_by.context

    @property
    def _taught_by(self) -> TeacherConfig:
        assert isinstance(self.config, TaughtConfig)
        assert self.config.teacher is not None  # `DistillConfig.data_sets` fills it in
        return self.config.teacher

    @property
    def setting(self) -> str:
        """The setting that names its data."""
        return f"mixture.{self.name}.data" if self.name else "data"


def read_data_sets(
    entries: Mapping[str, DataSetConfig], tokenizer: PreTrainedTokenizerBase, *, with_given: bool
) -> list[DataSet]:
    """The data sets of a run by name; with their completions if steps have some of them."""
    data_sets: list[DataSet] = []
    first = 0
    for name, entry in entries.items():
        teacher = entry.teacher if isinstance(entry, TaughtConfig) else None
        columns = () if teacher is None else teacher.context.columns
        prompts = encode_prompts(load_prompts(entry.data, columns), tokenizer, entry.data, dataset=name, first=first)
        given = given_samples(prompts, tokenizer) if with_given else None
        data_sets.append(DataSet(name, entry, prompts, given))
        first += len(prompts)
    return data_sets


def all_prompts(data_sets: Sequence[DataSet]) -> EndToEnd[EncodedPrompt]:
    """By their index."""
    return EndToEnd([data_set.prompts for data_set in data_sets])


def prompt_lengths(data_sets: Iterable[DataSet]) -> Array:
    """[n] int64 of all prompts."""
    return end_to_end([data_set.prompts.ids.lengths for data_set in data_sets], np.int64)


def sampled_lengths(data_sets: Iterable[DataSet]) -> Array:
    """Those of prompts that the student alone completes."""
    return prompt_lengths(data_set for data_set in data_sets if data_set.given is None)


def step_prompts(data_sets: Sequence[DataSet], per_step: int, step: int, seed: int) -> list[EncodedPrompt]:
    """The rows of a step. Each data set goes through its own as `batch_indices` does."""
    weights = [data_set.config.weight for data_set in data_sets]
    places = apportion(weights, step * per_step, per_step)
    rows = []
    for index, data_set in enumerate(data_sets):
        own = [place for who, place in places if who == index]
        own_seed = seed + zlib.crc32(data_set.name.encode())
        rows.append(iter(rows_at(len(data_set.prompts), range(own[0], own[-1] + 1), own_seed) if own else []))
    return [data_sets[index].prompts[next(rows[index])] for index, _ in places]


def apportion(weights: Sequence[float], first: int, count: int) -> list[tuple[int, int]]:
    """Places first … first + count − 1 of an endless sequence shared out by weight: (who, how many it had before).

    Sainte-Laguë's method: the next place goes to the greatest weight / (2 had + 1), the first of equals. After any number
    of places p, each has p · share to within (1 + share · len(weights)) / 2.
    """
    exact = [Fraction(weight) for weight in weights]
    total, doubt = sum(exact), Fraction(len(exact), 2)
    # Each has round(weight · t) for a common t ≥ (p − len / 2) / total: at least so many, and few are left to give.
    had = [max(0, math.ceil(weight * (first - doubt) / total - Fraction(1, 2))) for weight in exact]
    given = []
    for place in range(sum(had), first + count):
        who = max(range(len(exact)), key=lambda index: exact[index] / (2 * had[index] + 1))
        if place >= first:
            given.append((who, had[who]))
        had[who] += 1
    return given
