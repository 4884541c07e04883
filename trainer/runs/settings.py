"""Settings as plain data, under their full names (`optim.lr`); and names that earlier versions had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from fastkl.trainer.errors import ConfigError


class Renamed(NamedTuple):
    """A setting, or one value of it, that is written in another way now."""

    setting: str
    value: str | None  # None: whatever its value
    now: str


RENAMED = (
    Renamed("loss.objective", "sampled", "loss.objective: policy_gradient"),
    Renamed("loss.backward", "sampled", "loss.backward: sparse"),
    Renamed("loss.grad_error", None, "loss.sparse_error"),
    Renamed("teacher.base_of_student", None, "teacher.self"),
)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full names and values of nested settings."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_renamed(settings: Iterable[tuple[str, Any]], remedy: str) -> None:
    """Refuses a name or a value of before, also in an entry of a mixture, and says what it is called now."""
    given = list(settings)
    old = [
        entry
        for entry in RENAMED
        if any(f".{name}".endswith(f".{entry.setting}") and entry.value in (None, value) for name, value in given)
    ]
    if old:
        renamed = "; ".join(f"{name if value is None else f'{name}: {value}'} is now {now}" for name, value, now in old)
        raise ConfigError(f"settings of an earlier version: {renamed}. {remedy}")
