"""A server: where it is, and how patiently it is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from fastkl.trainer.config.rules import at_least, positive, unchanged
from fastkl.trainer.errors import ConfigError, require

LONGEST_TIMEOUT = 1e6  # seconds; the clocks of sockets and threads have their limits
EXAMPLE = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True)
class ServerConfig:
    """An OpenAI-compatible completions server.

    Args:
        url: Ask the server at this base address, for example http://127.0.0.1:8000/v1.
        model: Ask for the model that the server serves under this name.
        concurrency: Keep this many requests in flight.
        timeout: Wait this many seconds for a whole answer. Then the request is sent again.
        retries: Send a request again up to this many times: after a lost connection, after the timeout, and after status
            408, 425, 429 or 5xx. The pauses are 1, 2, 4, … up to 30 seconds.
        api_key_env: Read the API key from the environment variable of this name. The key itself is never written
            anywhere. null: send none.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "server.", "concurrency")
        positive(self, "server.", "timeout")
        require(
            self.timeout <= LONGEST_TIMEOUT,
            f"server.timeout is {self.timeout:g}; it must be at most {LONGEST_TIMEOUT:g} seconds",
        )
        at_least(0, self, "server.", "retries")
        require(
            self.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII) is not None,
            "server.api_key_env is not the name of an environment variable; put the key into one and give its name here",
        )
        if self.url:
            self._check_address()
        else:
            unchanged(self, "server.", "server.url is empty; give the server's url")

    def _check_address(self) -> None:
        require(
            "@" not in self.url.partition("//")[2].partition("/")[0] and "?" not in self.url,
            "server.url holds a user or a query, which config.yaml would show; put a key into an environment variable and "
            "its name into server.api_key_env",
        )
        parts = _parts(self.url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.fragment,
            f"server.url is {self.url!r}; it must begin with http:// or https:// and have no #, for example {EXAMPLE}",
        )
        require(bool(self.model), f"server.model is empty; give the name under which {self.url} serves the model")


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is read when it is asked for
    except ValueError as error:
        raise ConfigError(f"server.url is {url!r}, which is no address ({error}); give one like {EXAMPLE}") from error
    require(
        url.isprintable() and " " not in url,
        f"server.url is {url!r}, with characters that no address has; give one like {EXAMPLE}",
    )
    return parts
