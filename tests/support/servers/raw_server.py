"""A server that writes what a test tells it to: bytes, at any pace, that no library would send."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Reply = Callable[[socket.socket], None]


def answer(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


def _read_request(connection: socket.socket) -> None:
    """All of it: a connection that is closed with something unread is reset, and what was sent is lost."""
    with connection.makefile("rb") as lines:
        headers = dict(line.lower().split(b": ", 1) for line in iter(lines.readline, b"\r\n") if b": " in line)
        lines.read(int(headers[b"content-length"]))


@contextmanager
def replying(reply: Reply, certificate: Path | None = None) -> Iterator[tuple[str, list[int]]]:
    """Its address, and a list that has an entry for each connection.

    certificate: A file with key and certificate, with which it speaks TLS.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[int] = []

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            speaks_tls = connection.recv(1, socket.MSG_PEEK) == b"\x16"
            if certificate is not None:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate)
                connection = context.wrap_socket(connection, server_side=True)
            if not speaks_tls or certificate is not None:
                _read_request(connection)
            reply(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(1)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{listener.getsockname()[1]}/v1", connections
        listener.shutdown(socket.SHUT_RDWR)
