"""Ctrl-C and SIGTERM end a run between two phases, with a checkpoint of the last whole step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fastkl.trainer.runs import processes

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes a signal on to processes that have had it from the terminal or the scheduler: still the same one.
SAME_SIGNAL = 5.0  # seconds


class Stopped(KeyboardInterrupt):
    """A run was told to stop, and did so with a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.checkpoint = 0  # the step from which it goes on

    @property
    def exit_status(self) -> int:
        return 128 + self.number

    def __str__(self) -> str:
        name = "interrupted" if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"
        return f"{name}; the same command goes on after step {self.checkpoint}, of which there is a checkpoint"


class StopSignals:
    """While open, a first signal is kept until `check`; a second one ends the process at once."""

    def __init__(self) -> None:
        self._number = 0
        self._since = 0.0
        self._postponed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def told(self) -> bool:
        """Whether this process was told to stop."""
        return self._number != 0

    def check(self) -> None:
        """Raises Stopped on every process if any of them was told to stop. All processes call it at the same point."""
        if self._postponed:
            return
        number = max(processes.gather([self._number]))
        if number:
            raise Stopped(number)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """While open, `check` raises nothing: what was begun is to be whole."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = time.monotonic() - self._since
        if not self._number:
            self._number, self._since = number, time.monotonic()
            self._say("stopping after this phase, with a checkpoint; once more ends it at once")
        elif processes.count() == 1 or again > SAME_SIGNAL:
            self._say(
                "ended at once, without a checkpoint; the same command goes on from the last one, if there is one"
            )
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _say(self, text: str) -> None:
        if processes.rank() == 0:
            os.write(
                2, f"fastkl: {text}\n".encode()
            )  # a handler may interrupt a print, which must not be entered again
