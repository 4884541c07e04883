"""How settings are refused."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work, with its name, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
