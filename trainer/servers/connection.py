"""JSON over HTTP to a server that may be busy, slow, or away for a while."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import requests

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import ConfigError, ServerError

RETRY_PAUSE, RETRY_LONGEST_PAUSE = 1.0, 30.0  # seconds: the first pause, which doubles, and the longest
RETRY_STATUS = (408, 425, 429)  # and 5xx
QUOTED = 300  # characters of an answer that a message repeats
HINTS = {
    401: "; server.api_key_env names the environment variable with the key",
    403: "; server.api_key_env names the environment variable with the key",
    404: "; is server.url the base address (it mostly ends in /v1), and server.model a model of this server?",
}


Answer = TypeVar("Answer")


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
        self._announced = False
        self.failures = 0  # attempts that brought no answer: the server may have been started again since

    def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that answers; Refused where it is no use to ask again, ServerError where it was none."""
        return self._persist(url, body, self._object)

    def order(self, url: str, body: Mapping[str, Any]) -> None:
        """Has something done, whatever the answer says beyond status 200; 500 says that it cannot be done, as in vLLM."""
        self._persist(url, body, lambda response: None, final=(500,))

    def _persist(
        self,
        url: str,
        body: Mapping[str, Any],
        read: Callable[[requests.Response], Answer],
        final: tuple[int, ...] = (),
    ) -> Answer:
        start, attempt = time.monotonic(), 1
        while True:
            try:
                answer = read(self._once(url, body, final))
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
                return answer

    def _once(self, url: str, body: Mapping[str, Any], final: tuple[int, ...]) -> requests.Response:
        try:
            response = requests.post(url, json=body, timeout=self._timeout, auth=self._authorize, allow_redirects=False)
        except requests.RequestException as error:
            raise Transient(self._quote(f"{type(error).__name__}: {_innermost(error)}")) from error
        status = response.status_code
        if status in RETRY_STATUS or (status >= 500 and status not in final):
            asked = response.headers.get("Retry-After", "")
            raise Transient(f"HTTP {status}: {self._quote(response.text)}", float(asked) if asked.isdecimal() else 0.0)
        if status != 200:
            raise Refused(f"HTTP {status} from {url}: {self._quote(response.text)}{HINTS.get(status, '')}", status)
        return response

    def _object(self, response: requests.Response) -> dict[str, Any]:
        try:
            answer = response.json()
        except ValueError as error:
            raise Transient(f"no JSON in the answer: {self._quote(response.text)}") from error
        if not isinstance(answer, dict):
            raise Transient(f"no JSON object in the answer: {self._quote(response.text)}")
        return answer

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _quote(self, text: str) -> str:
        """The start of a text on one line, without the key."""
        text = text if self._key is None else text.replace(self._key, "***")
        return " ".join(text.split())[:QUOTED]

    def _announce(self, text: str) -> None:
        """Says that there is trouble: once, until a request is answered."""
        if not self._announced:
            self._announced = True
            print(text, file=sys.stderr, flush=True)


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
