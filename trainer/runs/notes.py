"""Lines that a user should read once, besides the progress of a run."""

from __future__ import annotations

import sys

from fastkl.trainer.runs import processes


def note(text: str) -> None:
    """A line on stderr, from the first process alone."""
    if processes.rank() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)
