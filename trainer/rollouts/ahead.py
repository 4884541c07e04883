"""Rollouts of coming steps: a server writes them while teachers score and the student learns (`sampling.steps_ahead`).

Step t, from 0, learns from what the student wrote as it was after max(0, t − steps_ahead) steps. Which weights write what
depends on nothing else, so that a run can be repeated. A thread of the first process asks the server, for one step after
the other. Weights change between two steps' rollouts alone: no completion is by two of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.rollouts.lengths import length_limit
from fastkl.trainer.rollouts.rollout import Rollouts, Start, everyones_unfinished, numbered
from fastkl.trainer.rollouts.samplers.served import ServedSampler, Weights
from fastkl.trainer.rollouts.single_turn import Responder, Trajectory
from fastkl.trainer.runs import processes

T = TypeVar("T")

PATIENCE = 0.05  # seconds until a wait looks whether the run is told to stop


@dataclass(eq=False)
class _Asked:
    """The rollouts of a step that the server was, or will be, asked for."""

    step: int
    steps_done: int  # by the student that writes them
    weights: Weights | None  # that it has; None for what was there when the run went on
    trajectories: list[Trajectory] | None = None
    error: BaseException | None = None
    seconds: float = 0.0  # that it took


class AheadRollouts(Rollouts):
    """Rollouts that are asked for before their step comes; see `Rollouts`, whose arguments the others are.

    Args:
        sampler: That of the responder, which nobody else uses but an evaluation: see `undisturbed`.
        steps: Of the whole run.
        tell: Is given each sample as soon as it is written, before it is graded, by any thread; maybe more than once.
    """

    def __init__(
        self,
        *rollouts: Any,
        sampler: ServedSampler,
        steps: int,
        tell: Callable[[Sample], None],
    ) -> None:
        super().__init__(*rollouts)
        self._sampler, self._steps, self._tell = sampler, steps, tell
        self._queue: list[_Asked] = []  # from the step that comes next on
        self._changed = threading.Condition()  # the queue
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, step: int) -> None:
        """Before a step: asks for what comes up to `steps_ahead` steps later, of the student as it is.

        The first process alone calls it, with a student that has its weights.
        """
        first = self._queue[-1].step + 1 if self._queue else step
        for coming in range(first, min(step + self._config.steps_ahead, self._steps - 1) + 1):
            self._put(_Asked(coming, step, self._sampler.hold()))

    def samples(self, step: int) -> list[Sample]:
        written = processes.raise_together(lambda: self._wait(step) if processes.rank() == 0 else [])
        first_given = len(self._starts(step, self._unfinished))
        return numbered(written, range(len(written))) + self._given_samples(step, first_given)

    def seconds(self) -> float:
        """How long the server took for the rollouts of the step at hand, on the first process."""
        return self._queue[0].seconds

    def carry_over(self, samples: Sequence[Sample]) -> None:
        unfinished = everyones_unfinished(samples)
        with self._changed:
            self._unfinished = unfinished
            del self._queue[:1]

    def settle(self, stopping: Callable[[], bool]) -> None:
        with self._changed:
            while self._open() is not None and not stopping():
                self._changed.wait(PATIENCE)

    def undisturbed(self, responder: Responder) -> Responder:
        """Answers by the student as it is, when the rollouts that were asked for are there."""
        return _Undisturbed(responder, self)

    def close(self) -> None:
        """Nobody waits any more: ends the thread, after the requests that it has in flight."""
        self._over.set()
        with self._changed:
            self._changed.notify_all()
            for asked in self._queue:
                if asked.weights is not None:
                    self._sampler.release(asked.weights)
                asked.weights = None

    def state_dict(self) -> dict[str, Any]:
        """The rollouts that are there; of the others, what writes them.

        Those of the student as it is are asked for again when the run goes on, and are no part of it.
        """
        with self._changed:
            kept = [asked for asked in self._queue if asked.trajectories is not None or not self._of_now(asked)]
            rows = [_row(asked) for asked in kept]
            weights = {asked.weights.version: asked.weights.state() for asked in kept if asked.weights is not None}
        return {**super().state_dict(), "settings": self._settings, "asked": rows, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("settings") == self._settings:  # else all is asked for again
            processes.raise_together(lambda: self._take(state) if processes.rank() == 0 else None)

    def _take(self, state: dict[str, Any]) -> None:
        """What a checkpoint holds of what was asked for."""
        weights = {version: self._sampler.restored(each) for version, each in state["weights"].items()}
        for row in state["asked"]:
            trajectories = None if row["trajectories"] is None else _unpacked(row["trajectories"])
            by = None if trajectories is not None else self._sampler.hold(weights[row["weights"]])
            self._put(_Asked(row["step"], row["steps_done"], by, trajectories, seconds=row["seconds"]))
        for each in weights.values():
            self._sampler.release(each)

    @property
    def _settings(self) -> dict[str, Any]:
        """Those that the samples are written under."""
        settings = asdict(self._config)
        return {name: value for name, value in settings.items() if name not in ("server", "max_staleness")}

    def _of_now(self, asked: _Asked) -> bool:
        return asked.weights is not None and self._sampler.is_current(asked.weights)

    def _put(self, asked: _Asked) -> None:
        with self._changed:
            self._queue.append(asked)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _open(self) -> _Asked | None:
        """What is to be written next; nothing after an error."""
        missing = next((asked for asked in self._queue if asked.trajectories is None), None)
        return None if missing is None or missing.error is not None else missing

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over.is_set() or self._open() is not None)
                asked = None if self._over.is_set() else self._open()
            if asked is None:
                return
            self._let_write(asked)

    def _let_write(self, asked: _Asked) -> None:
        start, weights = time.perf_counter(), asked.weights
        assert weights is not None
        found: list[Trajectory] | None = None
        try:
            with self._changed:
                starts = self._starts(asked.step, self._unfinished_before(asked))
            with self._sampler.pinned(weights, self._over):
                found = self._write(starts, asked.step, partial(self._finished, starts, asked.step))
        except BaseException as error:  # the main thread raises it when it comes to this step
            asked.error = error
        with self._changed:
            asked.trajectories, asked.seconds = found, time.perf_counter() - start
            if found is not None and asked.weights is not None:  # after an error, a checkpoint needs them
                asked.weights = None
                self._sampler.release(weights)
            self._changed.notify_all()

    def _finished(self, starts: Sequence[Start], step: int, place: int, trajectory: Trajectory) -> None:
        self._tell(self._sample(*starts[place], trajectory, length_limit(self._config, step)))

    def _wait(self, step: int) -> list[Sample]:
        with self._changed:
            asked = self._queue[0]
            self._changed.wait_for(lambda: asked.trajectories is not None or asked.error is not None)
        if asked.trajectories is None:
            assert asked.error is not None
            raise asked.error
        samples = self._samples(self._starts(step, self._unfinished), asked.trajectories, step)
        for sample in samples:
            sample.staleness = step - asked.steps_done
        return samples

    def _unfinished_before(self, asked: _Asked) -> Sequence[dict[str, Any]]:
        """What the step before leaves unfinished."""
        place = self._queue.index(asked)
        if place == 0:
            return self._unfinished
        before = self._queue[place - 1]
        assert before.trajectories is not None
        starts = self._starts(before.step, self._unfinished_before(before))
        return self._left(starts, before.trajectories, before.step)


class _Undisturbed:
    """See `AheadRollouts.undisturbed`."""

    def __init__(self, responder: Responder, rollouts: AheadRollouts) -> None:
        self._responder, self._rollouts = responder, rollouts

    def my_share(self, items: Sequence[T]) -> list[T]:
        return self._responder.my_share(items)

    def respond(self, prompts: Sequence[EncodedPrompt], **options: Any) -> list[Trajectory]:
        self._rollouts.settle(lambda: False)
        return self._responder.respond(prompts, **options)


LISTS = {"token_ids": torch.int64, "counted": torch.bool, "logprobs": torch.float64, "answer_ids": torch.int64}


def _row(asked: _Asked) -> dict[str, Any]:
    """As a checkpoint holds it."""
    return {
        "step": asked.step,
        "steps_done": asked.steps_done,
        "seconds": asked.seconds,
        "trajectories": None if asked.trajectories is None else _packed(asked.trajectories),
        "weights": None if asked.weights is None else asked.weights.version,
    }


def _packed(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Their lists end to end."""
    rows = [trajectory._asdict() for trajectory in trajectories]
    packed: dict[str, Any] = {name: [row[name] for row in rows] for name in Trajectory._fields}
    for name, dtype in LISTS.items():
        lists = packed[name]
        flat = torch.tensor([value for each in lists for value in each], dtype=dtype)
        packed[name] = {"values": flat, "lengths": [len(each) for each in lists]}
    return packed


def _unpacked(packed: dict[str, Any]) -> list[Trajectory]:
    columns = dict(packed)
    for name in LISTS:
        column = packed[name]
        columns[name] = [part.tolist() for part in column["values"].split(column["lengths"])]
    return [Trajectory(*row) for row in zip(*(columns[name] for name in Trajectory._fields), strict=True)]
