"""Several data sets in one run, each with a teacher and a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastkl.trainer.config.data import DataConfig, check_source
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class MixtureConfig:
    """One data set of several.

    Args:
        data: Where its prompts come from.
        teacher: The teacher of its samples; null: the run's. Equal ones are loaded once.
        weight: Its share of the prompts, relative to the others'. Shares are kept exactly over the steps.
    """

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig | None = None
    weight: float = 1.0


def check_mixture(mixture: dict[str, MixtureConfig], data: DataConfig, teacher: TeacherConfig) -> None:
    """Every data set has a source, a teacher and a share; nothing beside the mixture would be ignored."""
    require(
        data == DataConfig(),
        f"data.path is {data.path!r} and data.dataset is {data.dataset!r}, but mixture has the data sets "
        f"{', '.join(mixture)}; leave data out, or make it one of them",
    )
    require(
        teacher == TeacherConfig() or any(entry.teacher is None for entry in mixture.values()),
        f"teacher is set, but each data set of mixture ({', '.join(mixture)}) has a teacher of its own; unset one",
    )
    for name, entry in mixture.items():
        require(
            re.fullmatch(r"[\w-]+", name) is not None,
            f"mixture has a data set {name!r}; use letters, digits, _ and - (its name becomes that of a metric)",
        )
        check_source(f"mixture.{name}.data", entry.data)
        require(
            0 < entry.weight < float("inf"),
            f"mixture.{name}.weight is {entry.weight}; it must be > 0 and finite: leave out a data set that is not wanted",
        )
