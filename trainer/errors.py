"""How a run is refused, or ends."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work, with its name, its value and the remedy."""


class RunError(RuntimeError):
    """What is wrong is in the run's surroundings or in its numbers; mended, it goes on from its last checkpoint."""


class ServerError(RunError):
    """A server cannot do its part now."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
