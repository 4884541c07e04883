"""How a server fails a run that has begun."""

from __future__ import annotations

from fastkl.trainer.runs.errors import RunError


class ServerError(RunError):
    """A server cannot do its part now."""
