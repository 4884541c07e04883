"""Lines about what a command does, on stderr."""

from __future__ import annotations

import os
import sys


def note(text: str) -> None:
    """One line from the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"fastkl: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A text for a terminal: what it would obey instead of show, such as escape sequences, is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
