"""What is not wrong and may not be meant: one line each, at the start."""

from __future__ import annotations

from collections.abc import Sequence

from fastkl.trainer.data.mixture import DataSet, apportion
from fastkl.trainer.notes import note


def remark_on_data_sets(data_sets: Sequence[DataSet], per_step: int, setting: str) -> None:
    """Says where a step takes a row more than once; `setting` names what says how many it takes."""
    weights = [data_set.config.weight for data_set in data_sets]
    places = [who for who, _ in apportion(weights, 0, per_step)]
    for index, data_set in enumerate(data_sets):
        remark_on_rows(len(data_set.prompts), places.count(index), data_set.setting, setting)


def remark_on_rows(rows: int, taken: int, data: str, setting: str) -> None:
    """Says where a step takes more rows than there are."""
    times = -(-taken // rows)
    if times > 1:
        note(f"{data} has {rows} rows and a step takes {taken} ({setting}): a row comes up to {times} times in it")


def remark_on_length(longest: int, max_tokens: int) -> None:
    """Says where a sample alone is more than a forward pass may have."""
    if longest > max_tokens:
        note(
            f"batch.max_tokens is {max_tokens} and a sample may have {longest} tokens: a longer one has a forward pass of "
            f"its own"
        )
