"""How a run ends that cannot go on now."""

from __future__ import annotations


class RunError(RuntimeError):
    """What is wrong is in the run's surroundings or in its numbers; mended, it goes on from its last checkpoint."""
