"""How a run is refused, or ends."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot work, with its name, its value and the remedy."""


class RunError(RuntimeError):
    """What is wrong is in the run's surroundings or in its numbers; mended, it goes on from its last checkpoint."""

    exit_status = 2


class ServerError(RunError):
    """A server cannot do its part now."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def brief(error: BaseException, limit: int = 200) -> str:
    """What another package says, for a sentence of ours: one line, cut at a full stop or after `limit` characters."""
    said = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError)) or not said:
        said = f"{type(error).__name__}: {said}".rstrip(": ")
    if len(said) > limit:
        head = said[:limit]
        said = head[: head.rindex(". ")] if ". " in head else f"{head}…"
    return said.rstrip(".")
