"""Lines and bars about what a command does, on stderr."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

PAUSE = 10.0  # seconds between two lines of a log


def note(text: str) -> None:
    """One line from the first of several processes."""
    if _first():
        print(f"fastkl: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A text for a terminal: what it would obey instead of show, such as escape sequences, is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class Count:
    """How far something has come: a bar on a terminal, a plain line now and then in a log; a context manager.

    Args:
        title: What is counted, for example "answered".
        total: How many there will be.
        done: How many were there before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._title, self._total, self._first = title, total, done
        self._start = self._said = time.perf_counter()
        console = Console(stderr=True, quiet=not _first())
        columns = (TextColumn(title, markup=False), MofNCompleteColumn(), BarColumn())
        text = (TextColumn("{task.description}", markup=False), TextColumn("eta"), TimeRemainingColumn())
        self._bar = Progress(*columns, *text, console=console, disable=not console.is_terminal)
        self._quiet = console.is_terminal or console.quiet
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Count:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def at(self, done: int, text: str = "") -> None:
        """So many are done now; `text` says how it goes."""
        self._bar.update(self._task, completed=done, description=text)
        now = time.perf_counter()
        if self._quiet or (now - self._said < PAUSE and done < self._total):
            return
        self._said = now
        eta = (now - self._start) / max(1, done - self._first) * (self._total - done)
        print(f"{self._title} {done}/{self._total}  {text}  eta {eta:.0f} s", file=sys.stderr, flush=True)


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"
