"""One request over HTTP, within limits: of its whole time, from the first byte to the last, and of the answer's size."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import requests
from requests.adapters import HTTPAdapter

from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.quoting import quote_value

PIECE = 2**16  # bytes that are read at once
ENCODINGS = ("", "identity", "gzip", "deflate")


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


def exchange(
    url: str,
    body: Mapping[str, Any] | None,
    authorize: Callable[[requests.PreparedRequest], requests.PreparedRequest],
    *,
    seconds: float,
    most: int,
    whole: Callable[[int], bool],
) -> Answer:
    """The answer to a JSON object; redirects are not followed.

    Args:
        body: None: the address is read (GET).
        seconds: The request ends with requests.ReadTimeout after so many.
        most: Bytes of the body, once decompressed: a longer one is a BadAnswer.
        whole: Whether a body that comes with this status is needed. Else the first `PIECE` of it are read.
    """
    failure: Exception | None = None
    with _Deadline(seconds) as deadline, requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, _WatchedAdapter(deadline))
        try:
            with session.request(
                "GET" if body is None else "POST",
                url,
                json=body,
                timeout=seconds,
                auth=authorize,
                allow_redirects=False,
                stream=True,
                headers={"Accept-Encoding": "gzip"},
            ) as response:
                answer = Answer(
                    response.status_code, response.headers, _read(response, most, whole(response.status_code))
                )
        except Exception as error:
            failure = error
    if deadline.over:  # what a connection that was shut down raises depends on where it was read
        raise requests.ReadTimeout(f"no whole answer in {seconds:g} s")
    if failure is not None:
        raise failure
    return answer


def _read(response: requests.Response, most: int, whole: bool) -> bytes:
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if whole and encoding not in ENCODINGS:
        raise BadAnswer(f"it is encoded as {quote_value(encoding)}, where gzip was asked for at most")
    pieces: list[bytes] = []
    size = 0
    for piece in response.iter_content(PIECE):
        pieces.append(piece)
        size += len(piece)
        if not whole:
            break
        if size > most:
            raise BadAnswer(f"it is longer than {most} bytes, the most that was to be expected")
    return b"".join(pieces)


class _Deadline:
    """Shuts down the connections of a request when its time is over, which ends a read that waits for them.

    The timeouts of sockets begin anew with every byte.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for sock in self._sockets:
                sock.close()
            self._sockets.clear()

    def watch(self, sock: socket.socket) -> None:
        """Takes a connection that was just made. TLS goes on with another object, so a duplicate is kept."""
        with self._lock:
            self._sockets.append(socket.fromfd(sock.fileno(), sock.family, sock.type))
        if self.over:
            self._end()

    def _end(self) -> None:
        with self._lock:
            self.over = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):  # the other side may have gone
                    sock.shutdown(socket.SHUT_RDWR)


class _WatchedAdapter(HTTPAdapter):
    """Connects as requests does; a deadline watches its connections."""

    def __init__(self, deadline: _Deadline) -> None:
        self._deadline = deadline
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        return self._watch(super().proxy_manager_for(proxy, **kwargs))

    def _watch(self, manager: Any) -> Any:
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: _watched(pool, self._deadline) for scheme, pool in pools.items()}
        return manager


def _watched(pool: Any, deadline: _Deadline) -> type:
    class Connection(pool.ConnectionCls):
        def _new_conn(self) -> socket.socket:
            sock: socket.socket = super()._new_conn()
            deadline.watch(sock)
            return sock

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})
