"""Several data sets in one run, each with a weight, and in a distillation with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastkl.trainer.config.data import DataConfig, check_name, check_source
from fastkl.trainer.config.rules import positive, unchanged
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class DataSetConfig:
    """One data set of several.

    Args:
        data: Read its rows from here.
        weight: Set its share of the rows, relative to the other weights. Over the steps the shares are exact.
    """

    data: DataConfig = field(default_factory=DataConfig)
    weight: float = 1.0


@dataclass(frozen=True)
class TaughtConfig(DataSetConfig):
    """One data set of several, with its teacher.

    Args:
        teacher: Let this teacher score its samples. null: the run's teacher. Equal teachers are loaded once.
    """

    teacher: TeacherConfig | None = None


def check_data_sets(mixture: Mapping[str, DataSetConfig], data: DataConfig) -> None:
    """Every data set has a source and a share, or `data` has one where there is no mixture; `data` is not ignored."""
    if not mixture:
        check_source("data", data)
        return
    names = ", ".join(mixture)
    unchanged(data, "data.", f"mixture has the data sets {names}; leave data out, or make it one of them")
    for name, entry in mixture.items():
        check_name("mixture", name)
        check_source(f"mixture.{name}.data", entry.data)
        positive(entry, f"mixture.{name}.", "weight")


def check_common_teacher(mixture: Mapping[str, TaughtConfig], teacher: TeacherConfig) -> None:
    """The run's own teacher is that of a data set."""
    require(
        teacher == TeacherConfig() or not mixture or any(entry.teacher is None for entry in mixture.values()),
        f"teacher is set, but each data set of mixture ({', '.join(mixture)}) has a teacher of its own; unset one",
    )
