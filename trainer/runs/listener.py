"""What a run tells while it goes: callbacks of the user's own, and the seconds of each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from fastkl.trainer.data.samples import Sample
from fastkl.trainer.runs.folder import RunFolder


class Listener:
    """Callbacks of a run. Override those that you need, and give an instance to `distill` or `sft` as `listener`.

    Every process calls them, at the same points of the run. The run waits for them. What they raise ends the run.
    """

    def on_start(self, steps_done: int, steps: int) -> None:
        """Before the first step. `steps_done` is 0, or the step of the checkpoint from which the run goes on."""

    def on_phase(self, phase: str) -> AbstractContextManager[None]:
        """A context that is entered when a phase of a step begins, and left when it ends.

        The phases are the names of the metrics `time/*`: "sample", "teacher", "train" and so on.
        """
        return nullcontext()

    def on_step(self, step: int, metrics: dict[str, float], samples: Sequence[Sample]) -> None:
        """After a step was logged, before its checkpoint. Steps count from 1; step 0 is the evaluation before the first.

        `metrics` is the row of metrics.jsonl. `samples` are those of the step that this process has: all of them, where
        there is one.
        """

    def on_end(self, folder: RunFolder) -> None:
        """After the student was saved."""


SILENT = Listener()


class Clock:
    """Seconds by phase, for the metrics `time/*`; `after_phase` is called after each."""

    def __init__(self, listener: Listener, after_phase: Callable[[], None]) -> None:
        self._listener, self._after_phase = listener, after_phase
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with self._listener.on_phase(phase):
            start = time.perf_counter()
            yield
            self.seconds[f"time/{phase}"] += time.perf_counter() - start
        self._after_phase()
