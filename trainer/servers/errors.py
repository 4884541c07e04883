"""How a server fails a run that has begun."""

from __future__ import annotations


class ServerError(RuntimeError):
    """A server cannot do its part now; what is wrong is in the run's surroundings, and the run can be resumed."""
