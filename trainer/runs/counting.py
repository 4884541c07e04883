"""How far something has come that takes a while: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastkl.trainer.runs import processes

PAUSE = 10.0  # seconds between two lines of a log


class Count:
    """Shows on the first process how many of so many are done; a context manager.

    Args:
        title: What is counted, for example "answered".
        total: How many there will be.
        done: How many were there before.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._first = title, total, done
        self._start = self._said = time.perf_counter()
        console = Console(stderr=True, quiet=processes.rank() > 0)
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
