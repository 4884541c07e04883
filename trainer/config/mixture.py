"""Several data sets in one run, each with a teacher and a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fastkl.trainer.config.data import DataConfig, check_source
from fastkl.trainer.config.rules import positive, unchanged
from fastkl.trainer.config.teacher import TeacherConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class MixtureConfig:
    """One data set of several.

    Args:
        data: Read its prompts from here.
        teacher: Let this teacher score its samples. null: the run's teacher. Equal teachers are loaded once.
        weight: Set its share of the prompts, relative to the other weights. Over the steps the shares are exact.
    """

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig | None = None
    weight: float = 1.0


def check_mixture(mixture: dict[str, MixtureConfig], data: DataConfig, teacher: TeacherConfig) -> None:
    """Every data set has a source, a teacher and a share, and nothing beside the mixture would be ignored."""
    names = ", ".join(mixture)
    unchanged(data, "data.", f"mixture has the data sets {names}; leave data out, or make it one of them")
    require(
        teacher == TeacherConfig() or any(entry.teacher is None for entry in mixture.values()),
        f"teacher is set, but each data set of mixture ({names}) has a teacher of its own; unset one",
    )
    for name, entry in mixture.items():
        require(
            re.fullmatch(r"[\w-]+", name) is not None,
            f"mixture has a data set {name!r}, and its name becomes that of a metric; use only letters, digits, _ and -",
        )
        check_source(f"mixture.{name}.data", entry.data)
        positive(entry, f"mixture.{name}.", "weight")
