"""Several calls at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def gather(function: Callable[[Item], Result], items: Sequence[Item], concurrency: int) -> list[Result]:
    """The function's results in order, so many calls at once; the first error ends it.

    The threads are daemons: neither an error nor Ctrl-C waits for requests in flight.
    """
    todo: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Result | BaseException]] = queue.SimpleQueue()
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                index, item = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, function(item)))
            except BaseException as error:
                done.put((index, error))

    for pair in enumerate(items):
        todo.put(pair)
    for _ in range(min(concurrency, len(items))):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, Result] = {}
    try:
        while len(results) < len(items):
            index, result = done.get()
            if isinstance(result, BaseException):
                raise result
            results[index] = result
    finally:
        over.set()
    return [results[index] for index in range(len(items))]
