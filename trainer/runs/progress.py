"""What a run shows while it goes: a live bar on a terminal, one plain line a step in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastkl.trainer.metrics import METRICS, PROGRESS
from fastkl.trainer.runs import processes


class ProgressBar:
    """Shows the steps of a run, on its first process; a context manager."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._console = Console(stderr=True, quiet=processes.rank() > 0)
        self._start, self._first = time.perf_counter(), done
        self._progress: Progress | None = None
        if self._console.is_terminal and not self._console.quiet:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, steps_done: int, metrics: dict[str, float]) -> None:
        shown = [METRICS[name] for name in PROGRESS if name in metrics]
        text = "  ".join(f"{metric.label or metric.name} {metrics[metric.name]:{metric.format}}" for metric in shown)
        if self._progress is not None:
            self._progress.update(self._task, completed=steps_done, description=text)
            return
        pace = (time.perf_counter() - self._start) / max(1, steps_done - self._first)
        eta = pace * (self._total - steps_done)
        self._print(f"step {steps_done}/{self._total}  {text}  eta {eta:.0f} s")

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            self._print(text)

    def _print(self, line: str) -> None:
        if not self._console.quiet:
            print(line, file=sys.stderr, flush=True)
