"""A server: where it is, and how patiently it is asked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class ServerConfig:
    """An OpenAI-compatible completions server.

    Args:
        url: Base address as OpenAI's clients take it, for example http://127.0.0.1:8000/v1.
        model: Name under which the server serves the model.
        concurrency: Requests in flight at once.
        timeout: Seconds without an answer after which a request is sent again.
        retries: How often it is sent again (after a lost connection, no answer in time, status 408, 425, 429 or 5xx),
            with pauses of 1, 2, 4, … up to 30 seconds.
        api_key_env: Name of the environment variable that holds the API key; null sends none. The key itself is never
            written anywhere.
    """

    url: str = ""
    model: str = ""
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        require(self.concurrency >= 1, f"server.concurrency is {self.concurrency}; it must be at least 1")
        require(self.timeout > 0, f"server.timeout is {self.timeout}; it must be > 0 seconds")
        require(self.retries >= 0, f"server.retries is {self.retries}; it must be >= 0 (0: no second attempt)")
        require(
            self.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII) is not None,
            "server.api_key_env is not the name of an environment variable; put the key into one and give its name here",
        )
        if not self.url:
            for name, value in vars(self).items():
                changed = value != getattr(type(self), name)
                require(not changed, f"server.{name} is {value!r} but server.url is empty; give the server's url")
            return
        parts = urlsplit(self.url)
        require(
            "@" not in parts.netloc and not parts.query,
            "server.url holds a user or a query, which config.yaml would show; put a key into an environment variable and "
            "its name into server.api_key_env",
        )
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"server.url is {self.url!r}; it must begin with http:// or https://, for example http://127.0.0.1:8000/v1",
        )
        require(bool(self.model), f"server.model is empty; give the name under which {self.url} serves the model")
