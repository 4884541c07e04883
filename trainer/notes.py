"""Lines about what a command does, on stderr."""

from __future__ import annotations

import os
import sys


def note(text: str) -> None:
    """One line from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastkl: {text}", file=sys.stderr, flush=True)
