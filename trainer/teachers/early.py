"""Questions to a server that are asked before anybody waits for the answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Early(Generic[Item, Result]):
    """Answers to come. The threads are daemons, and end where nothing is left to ask.

    Args:
        ask: The answers to some items, in one request.
        most: Items in a request: those that wait when one begins.
        concurrency: Requests in flight.
    """

    def __init__(self, ask: Callable[[Sequence[Item]], list[Result]], most: int, concurrency: int) -> None:
        self._ask, self._most, self._concurrency = ask, most, concurrency
        self._lock = threading.Lock()
        self._answers: dict[Hashable, Future[Result]] = {}
        self._waiting: list[tuple[Item, Future[Result]]] = []
        self._threads = 0

    def add(self, key: Hashable, item: Item) -> None:
        """Asks about an item, unless it was done under this key; by any thread."""
        with self._lock:
            if key in self._answers:
                return
            self._answers[key] = answer = Future[Result]()
            self._waiting.append((item, answer))
            if self._threads < self._concurrency:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def find(self, key: Hashable) -> Future[Result] | None:
        """The answer, which may be still to come; None where nobody has asked."""
        return self._answers.get(key)

    def forget(self, keys: Iterable[Hashable]) -> None:
        with self._lock:
            for key in keys:
                self._answers.pop(key, None)

    def close(self) -> None:
        """Asks no more than it has begun to."""
        with self._lock:
            self._waiting.clear()

    def _work(self) -> None:
        while group := self._next():
            try:
                answers = self._ask([item for item, _ in group])
            except BaseException as error:  # whoever waits raises it
                for _, answer in group:
                    answer.set_exception(error)
            else:
                for (_, answer), result in zip(group, answers, strict=True):
                    answer.set_result(result)

    def _next(self) -> list[tuple[Item, Future[Result]]]:
        with self._lock:
            group = self._waiting[: self._most]
            del self._waiting[: self._most]
            self._threads -= not group
            return group
