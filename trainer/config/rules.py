"""Rules that many settings share. A refusal names the setting, its value and the way out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastkl.trainer.errors import ConfigError, require


def at_least(low: int, config: Any, prefix: str, *names: str) -> None:
    """Refuses settings below `low`. Those of a type with None may be null."""
    for name in names:
        value, or_null = getattr(config, name), _or_null(config, name)
        require(
            (value is None and bool(or_null)) or low <= value < float("inf"),
            f"{prefix}{name} is {value}; it must be at least {low}{' and finite' * (value == float('inf'))}{or_null}",
        )


def positive(config: Any, prefix: str, *names: str) -> None:
    """Refuses settings that are not above 0 and finite. Those of a type with None may be null."""
    for name in names:
        value, or_null = getattr(config, name), _or_null(config, name)
        require(
            (value is None and bool(or_null)) or 0 < value < float("inf"),
            f"{prefix}{name} is {value}; it must be > 0 and finite{or_null}",
        )


def fraction(config: Any, prefix: str, *names: str) -> None:
    """Refuses settings outside 0 … 1."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{prefix}{name} is {value}; it must be between 0 and 1")


def unchanged(config: Any, prefix: str, reason: str, names: Iterable[str] | None = None) -> None:
    """Refuses other values than the defaults, of all settings or of those named: they would be ignored, for a `reason`."""
    for name in (field.name for field in dataclasses.fields(config)) if names is None else names:
        value = getattr(config, name)
        require(value == default_of(config, name), f"{prefix}{name} is {value!r}, but {reason}")


@contextmanager
def named(settings: Mapping[str, str]) -> Iterator[None]:
    """Turns a ValueError about an argument into a ConfigError about the setting that it comes from."""
    try:
        yield
    except ValueError as error:
        arguments = "|".join(settings)
        text = re.sub(rf"\b({arguments})(?= is | ')", lambda match: settings[match[0]], str(error))
        raise ConfigError(text.replace("None", "null")) from error


def _field(config: Any, name: str) -> Any:
    (field,) = (field for field in dataclasses.fields(config) if field.name == name)
    return field


def default_of(config: Any, name: str) -> Any:
    """A setting's default; `dataclasses.MISSING` for one that must be given."""
    field = _field(config, name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _or_null(config: Any, name: str) -> str:
    return ", or null" if "None" in str(_field(config, name).type) else ""
