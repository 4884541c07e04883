"""JSON over HTTP to a server that may be busy, slow, or away for a while."""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import requests

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import ConfigError, ServerError
from fastkl.trainer.servers.answers import BadAnswer
from fastkl.trainer.servers.quoting import conceal, quote, quote_address
from fastkl.trainer.servers.transport import Answer, exchange

RETRY_PAUSE, RETRY_LONGEST_PAUSE = 1.0, 30.0  # seconds: the first pause, which doubles, and the longest
RETRY_STATUS = (408, 425, 429)  # and 5xx
ANSWER_BYTES = 2**24  # the most that an answer may have,
ENTRY_BYTES = 2**9  # and for every log-prob or id that it was asked for: several times what vLLM writes
HINTS = {
    401: "; server.api_key_env names the environment variable with the key",
    403: "; server.api_key_env names the environment variable with the key",
    404: "; is server.url the base address (it mostly ends in /v1), and server.model a model of this server?",
}
LOST_TLS = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # the connection broke: that may pass

Result = TypeVar("Result")


class Refused(ServerError):
    """The server answered that it will not do this."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Transient(Exception):
    """What may be over at the next attempt."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds that the server asked for


class Connection:
    """Sends requests again until they are answered, within limits; may be used by several threads.

    Args:
        whose: What messages call the server, "the teacher's server".
    """

    def __init__(self, config: ServerConfig, whose: str) -> None:
        self.whose = whose
        self.url = config.url.rstrip("/")
        self._attempts, self._timeout = config.retries + 1, config.timeout
        self._key = _api_key(config.api_key_env)
        if self._key is not None:
            conceal(self._key)
        self._announced = False
        self.failures = 0  # attempts that brought no answer: the server may have been started again since

    def post(self, url: str, body: dict[str, Any], entries: int = 0) -> dict[str, Any]:
        """The JSON object that answers.

        Args:
            entries: How many log-probs and ids are asked for: they limit the size of the answer.

        Raises:
            Refused: Where the server says that it will not.
            BadAnswer: For an answer that no server gives to this.
            ServerError: Where there was none.
        """
        return self._persist(url, body, _object, entries=entries)

    def told(self, url: str) -> dict[str, Any] | None:
        """The JSON object that is to be read there; None where there is none. It is asked for once."""
        try:
            return _object(self._once(url, None, 0, ()))
        except (Transient, ServerError, BadAnswer):
            return None

    def order(self, url: str, body: Mapping[str, Any]) -> None:
        """Has something done, whatever the answer says beyond status 200; 500 says that it cannot be done, as in vLLM."""
        self._persist(url, body, lambda answer: None, final=(500,))

    def _persist(
        self,
        url: str,
        body: Mapping[str, Any],
        read: Callable[[Answer], Result],
        *,
        entries: int | None = None,
        final: tuple[int, ...] = (),
    ) -> Result:
        start, attempt = time.monotonic(), 1
        while True:
            try:
                result = read(self._once(url, body, entries, final))
            except Transient as error:
                self.failures += 1
                if attempt == self._attempts:
                    raise ServerError(
                        f"{self.whose} gave no answer at {url} in {attempt} attempts and "
                        f"{time.monotonic() - start:.0f} s: {error}. Bring it back, and give the same command again: a "
                        f"training run goes on where it stopped"
                    ) from error
                self._announce(f"{self.whose}: {error}; trying again, {self._attempts} attempts in all")
                time.sleep(min(RETRY_LONGEST_PAUSE, max(error.pause, RETRY_PAUSE * 2 ** (attempt - 1))))
                attempt += 1
            else:
                self._announced = False
                return result

    def _once(self, url: str, body: Mapping[str, Any] | None, entries: int | None, final: tuple[int, ...]) -> Answer:
        try:
            answer = exchange(
                url,
                body,
                self._authorize,
                seconds=self._timeout,
                most=ANSWER_BYTES + ENTRY_BYTES * (entries or 0),
                whole=lambda status: status == 200 and entries is not None,
            )
        except (OSError, ValueError) as error:  # those of requests are OSErrors, but for some about addresses
            said = quote(f"{type(error).__name__}: {_innermost(error)}")
            remedy = _remedy(error)
            if remedy is None:
                raise Transient(said) from error
            raise ServerError(f"{self.whose} cannot be asked at {url}: {said}; {remedy}") from error
        status = answer.status
        if status == 200:
            return answer
        if 300 <= status < 400 and "Location" in answer.headers:
            raise Refused(
                f"HTTP {status} from {url}: it redirects to {quote_address(answer.headers['Location'])}, and redirects are "
                f"not followed; set server.url to where the server is",
                status,
            )
        said = _quoted(answer)
        if status in RETRY_STATUS or (status >= 500 and status not in final):
            asked = answer.headers.get("Retry-After", "")
            raise Transient(f"HTTP {status}: {said}", float(asked) if asked.isdecimal() else 0.0)
        raise Refused(f"HTTP {status} from {url}: {said}{HINTS.get(status, '')}", status)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _announce(self, text: str) -> None:
        """Says that there is trouble: once, until a request is answered."""
        if not self._announced:
            self._announced = True
            print(text, file=sys.stderr, flush=True)


def _object(answer: Answer) -> dict[str, Any]:
    try:
        found = json.loads(answer.body)
    except RecursionError as error:
        raise BadAnswer("it is nested too deeply to be read") from error
    except ValueError as error:
        raise Transient(f"no JSON in the answer: {_quoted(answer)}") from error
    if not isinstance(found, dict):
        raise Transient(f"no JSON object in the answer: {_quoted(answer)}")
    return found


def _quoted(answer: Answer) -> str:
    return quote(answer.body.decode(errors="replace"))


def _remedy(error: BaseException) -> str | None:
    """What to do about that which waiting does not mend; None where it may pass."""
    first = _innermost(error)
    if isinstance(first, ssl.SSLCertVerificationError):
        return (
            "server.url must have a name that stands in the certificate, and REQUESTS_CA_BUNDLE names a file with the "
            "certificates to trust"
        )
    if isinstance(first, ssl.SSLError) and not isinstance(first, LOST_TLS):
        return "does this server speak https?"
    if isinstance(error, ValueError):
        return "correct server.url"
    if not isinstance(error, requests.RequestException):  # a file for TLS that is not there
        return "see REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"
    return None


def _innermost(error: BaseException) -> BaseException:
    """What all began with, "Connection refused": the errors around it repeat addresses and names of objects."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ConfigError(
            f"server.api_key_env is {variable!r}, but that environment variable is unset, empty or no plain text; set it "
            f"to the API key"
        )
    return key
