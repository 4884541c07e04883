"""Servers that answer over HTTP what no server should: they cost neither memory nor time, and one sentence says so."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from raw_server import Reply, answer, replying

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import ServerError
from fastkl.trainer.servers import connection
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.connection import Connection, Refused

MIB = 2**20
KEY = "sk/very+secret=="


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RETRY_PAUSE", 0.0)


def connected(url: str, **settings: object) -> Connection:
    return Connection(ServerConfig(url=url, model="m", **{"retries": 1, "timeout": 5.0, **settings}), "the server")  # type: ignore[arg-type]


def ask(url: str, **settings: object) -> object:
    client = connected(url, **settings)
    return client.post(f"{client.url}/completions", {})


def sent(content: bytes) -> Reply:
    return lambda sock: sock.sendall(content)


def bomb(size: int) -> bytes:
    return answer(gzip.compress(b" " * size, 1), "Content-Encoding: gzip")


def endless(start: bytes, piece: bytes, pause: float = 0.0) -> Reply:
    def reply(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(piece)
            time.sleep(pause)

    return reply


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SPACES = b"%x\r\n%s\r\n" % (MIB, b" " * MIB)
UNFIT: dict[str, tuple[Reply, str]] = {
    "gzip bomb": (sent(bomb(200 * MIB)), "it is longer than 16777216 bytes"),
    "chunked spaces": (endless(CHUNKED, SPACES), "it is longer than"),
    "no length": (endless(b"HTTP/1.0 200 OK\r\n\r\n", b" " * MIB), "it is longer than"),
    "gzip twice": (sent(answer(b"{}", "Content-Encoding: gzip, gzip")), "encoded as 'gzip, gzip'"),
    "deep": (sent(answer(b"[" * 200_000)), "nested too deeply"),
    "deep object": (sent(answer(b'{"a":' * 200_000)), "nested too deeply"),
}


@pytest.mark.parametrize(("reply", "message"), UNFIT.values(), ids=UNFIT)
def test_answers_that_are_given_up_at_once(reply: Reply, message: str) -> None:
    tracemalloc.start()
    try:
        with replying(reply) as (url, connections), pytest.raises(BadAnswer, match=message):
            ask(url)
        assert tracemalloc.get_traced_memory()[1] < 60 * MIB
    finally:
        tracemalloc.stop()
    assert len(connections) == 1


def test_the_limit_grows_with_what_is_asked_for() -> None:
    body = json.dumps({"a": "b" * (20 * MIB)}).encode()
    with replying(sent(answer(gzip.compress(body, 1), "Content-Encoding: gzip"))) as (url, _):
        client = connected(url)
        assert client.post(client.url, {}, entries=8 * MIB // 512) == json.loads(body)
        with pytest.raises(BadAnswer, match="longer than"):
            client.post(client.url, {}, entries=1)


def test_what_is_not_needed_is_not_read() -> None:
    """A refusal is known by its status, and its beginning is quoted; an order is done by its status alone."""
    refusal = b"HTTP/1.1 418 no\r\nTransfer-Encoding: chunked\r\n\r\n" + b"3\r\nbut\r\n" + SPACES * 5
    with replying(endless(refusal, SPACES)) as (url, _), pytest.raises(Refused, match=r"HTTP 418 from .*: but"):
        ask(url)
    with replying(endless(CHUNKED + SPACES, b"", 0.1)) as (url, _):
        connected(url).order(url, {})


DRIPS: dict[str, Reply] = {
    "status": endless(b"HTTP/1.1 2", b"0", 0.05),
    "headers": endless(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.05),
    "body": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b" ", 0.05),
    "body without a length": endless(b"HTTP/1.0 200 OK\r\n\r\n{}", b" ", 0.05),
    "body of an error": endless(b"HTTP/1.1 503 OK\r\nContent-Length: 9999\r\n\r\n", b" ", 0.05),
    "continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "nothing": lambda sock: time.sleep(10),
}


@pytest.mark.parametrize("reply", DRIPS.values(), ids=DRIPS)
def test_the_timeout_is_that_of_the_whole_request(reply: Reply) -> None:
    start = time.monotonic()
    with replying(reply) as (url, connections), pytest.raises(ServerError, match=r"in 2 attempts .*ReadTimeout"):
        ask(url, timeout=0.3)
    assert time.monotonic() - start < 5
    assert len(connections) == 2


@pytest.mark.parametrize("reply", [sent(answer(b"{}")), DRIPS["body"]], ids=["answers", "drips"])
def test_through_a_proxy(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    with replying(reply) as (url, connections):
        monkeypatch.setenv("http_proxy", url)
        with pytest.raises(ServerError, match="ReadTimeout: no whole") if reply is DRIPS["body"] else nullcontext():
            assert ask("http://server.test/v1", timeout=0.3, retries=0) == {}
        assert len(connections) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    line = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*line.split(), "-keyout", file, "-out", file.with_suffix(".crt")], check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_suffix(".crt").read_text())
    return file


def test_a_certificate_that_nobody_trusts_is_refused_at_once(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replying(sent(answer(b"{}")), certificate) as (url, connections):
        message = f"the server cannot be asked at {url}.*SSLError.*self-signed certificate.*REQUESTS_CA_BUNDLE"
        with pytest.raises(ServerError, match=message):
            ask(url)
        assert len(connections) == 1
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert ask(url) == {}
        with pytest.raises(
            ServerError, match=r"certificate is not valid for 'localhost'.*server\.url must have a name"
        ):
            ask(url.replace("127.0.0.1", "localhost"))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/file")
        with pytest.raises(ServerError, match="/no/such/file; see REQUESTS_CA_BUNDLE"):
            ask(url)


def test_the_timeout_is_that_of_a_whole_tls_request(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with replying(DRIPS["headers"], certificate) as (url, _), pytest.raises(ServerError, match="ReadTimeout: no whole"):
        ask(url, timeout=0.3, retries=0)


def test_tls_where_there_is_none_is_refused_at_once() -> None:
    with replying(sent(answer(b"{}"))) as (url, connections):
        with pytest.raises(ServerError, match=r"does this server speak https\?"):
            ask(url.replace("http:", "https:"))
        assert len(connections) == 1


@pytest.mark.parametrize("url", [f"http://{'a' * 80}.test/v1", "http://a..b/v1", "http://[::1]x/v1", "http://ü..test/"])
def test_an_address_that_is_none_is_refused_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("it is tried again")

    monkeypatch.setattr(connection.time, "sleep", sleep)
    with pytest.raises(ServerError, match=r"cannot be asked at .*; correct server\.url"):
        ask(url)


BREAKS: dict[str, Callable[[socket.socket], None]] = {
    "at once": lambda sock: None,
    "in the headers": sent(b"HTTP/1.1 200 OK\r\nContent-"),
    "in the body": sent(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a"'),
    "in a chunk": sent(CHUNKED + b'9\r\n{"a"'),
    "in gzip": sent(answer(gzip.compress(b" " * MIB)[:500], "Content-Encoding: gzip")),
    "no gzip": sent(answer(b"{}", "Content-Encoding: gzip")),
    "no HTTP": sent(b"\x1b]0;pwned\x07\x1b[2J\r\n\r\n"),
    "no text": sent(answer(b"\xff\xfe\x00")),
    "no number": sent(answer(b'{"a": %s}' % (b"9" * 5000))),
    "a list": sent(answer(b"[]")),
    "headers": sent(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n"),
    "a header": sent(b"HTTP/1.1 200 OK\r\nX: " + b"y" * MIB + b"\r\n\r\n"),
    "a retry": sent(b"HTTP/1.1 503 no\r\nRetry-After: " + b"0" * 400 + b"\r\nContent-Length: 0\r\n\r\n"),
}


@pytest.mark.parametrize("reply", BREAKS.values(), ids=BREAKS)
def test_answers_that_break_are_asked_for_again(reply: Reply) -> None:
    with replying(reply) as (url, connections), pytest.raises(ServerError, match="in 2 attempts") as error:
        ask(url)
    assert len(connections) == 2
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


HOSTILE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\u2028\ud800 {0} end"
SPELLINGS = {
    "plain": KEY,
    "json": KEY.replace("/", "\\/"),
    "unicode": KEY.replace("+", "\\u002B").replace("=", "\\u003d"),
    "url": KEY.replace("/", "%2F").replace("+", "%2b"),
    "html": KEY.replace("+", "&#43;").replace("/", "&#x2F;"),
    "case": KEY.upper(),
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("status", [200, 401, 503])
def test_keys_and_escape_sequences_are_never_shown(
    status: int, spelled: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    said = HOSTILE.format(spelled).encode(errors="surrogatepass")
    long = said + b" " * 290 + spelled.encode() * 3
    for body in (said, long):
        with replying(sent(answer(body).replace(b"200", b"%d" % status))) as (url, _):
            with pytest.raises(ServerError) as error:
                ask(url, api_key_env="SERVER_KEY")
            text = str(error.value)
            assert "pwned" in text
            assert "***" in text
            assert "very" not in text.lower()
            assert (text + capfd.readouterr().err.replace("\n", "")).isprintable()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://elsewhere.test/v1/completions", "https://elsewhere.test/v1/completions,"),
        ("/login?next=secret#secret", r"/login\?\*\*\*,"),
        ("https://me:secret@elsewhere.test/v1", r"https://\*\*\*@elsewhere.test/v1,"),
        (f"http://a/{KEY}", r"http://a/\*\*\*,"),
        ("http://a/" + "b" * 5000, r"http://a/b{291}…,"),
    ],
)
def test_a_redirect_names_where_to(status: int, location: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    reply = sent(answer(b"moved", f"Location: {location}").replace(b"200 OK", b"%d moved" % status))
    with replying(reply) as (url, connections):
        with pytest.raises(Refused, match=rf"HTTP {status} from .*: it redirects to {shown}.*set server\.url") as error:
            ask(url, api_key_env="SERVER_KEY")
        assert len(connections) == 1
    assert "secret" not in str(error.value)
