"""The teacher of a run: loaded here or behind HTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from fastkl.trainer.config.errors import require
from fastkl.trainer.config.loss import Objective
from fastkl.trainer.config.models import ModelConfig


@dataclass(frozen=True)
class ServerConfig:
    """A teacher behind HTTP: an OpenAI-compatible completions server that gives log-probs of the prompt (vLLM).

    Args:
        url: Base address as OpenAI's clients take it, for example http://127.0.0.1:8000/v1.
        model: Name under which the server serves the teacher.
        api: How it is asked: prompt_logprobs (vLLM), echo (with logprobs), or auto: the first of them that it answers.
        sequences_per_request: Samples in one request.
        concurrency: Requests in flight at once.
        timeout: Seconds without an answer after which a request is sent again.
        retries: How often it is sent again (after a lost connection, no answer in time, status 408, 425, 429 or 5xx),
            with pauses of 1, 2, 4, … up to 30 seconds.
        api_key_env: Name of the environment variable that holds the API key; null sends none. The key itself is never
            written anywhere.
    """

    url: str = ""
    model: str = ""
    api: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    sequences_per_request: int = 8
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("sequences_per_request", "concurrency"):
            require(getattr(self, name) >= 1, f"server.{name} is {getattr(self, name)}; it must be at least 1")
        require(self.timeout > 0, f"server.timeout is {self.timeout}; it must be > 0 seconds")
        require(self.retries >= 0, f"server.retries is {self.retries}; it must be >= 0 (0: no second attempt)")
        require(
            self.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII) is not None,
            "server.api_key_env is not the name of an environment variable; put the key into one and give its name here",
        )
        if not self.url:
            for name, value in vars(self).items():
                changed = value != getattr(ServerConfig, name)
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


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A model that only scores: loaded here, from `path`, served elsewhere, by `server`, or the student's own base.

    Args:
        server: The server in place of `path`; it decides about dtype and attention.
        tokenizer: Folder or Hub id of the served model's tokenizer; null: the server is asked.
        base_of_student: The model under the student's LoRA adapter, in place of `path`: the student with its adapter off.
            No second copy.
        device: Where the model is loaded: cpu, cuda:1, …; null: where the student is.
        quantization: Load the blocks in 8 or 4 bits (package bitsandbytes), the head as it is; null: as the folder holds
            them, which may be quantised already.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    tokenizer: str | None = None
    base_of_student: bool = False
    device: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None


def check_teacher(name: str, config: TeacherConfig) -> None:
    """Exactly one of folder, server and student's base, and nothing that would be ignored."""
    url = config.server.url
    if config.base_of_student:
        for setting, value in vars(config).items():
            require(
                setting == "base_of_student" or value == vars(TeacherConfig())[setting],
                f"{name}.base_of_student is true but {name}.{setting} is {value!r}: the student's own model is the "
                f"teacher, as it was loaded; unset one of them",
            )
        return
    require(
        bool(config.path or url),
        f"{name}.path is empty and so is {name}.server.url; give a model folder or a Hub id, or a server's url",
    )
    require(
        not (config.path and url),
        f"{name}.path is {config.path!r} and {name}.server.url is {url!r}; give exactly one of them",
    )
    require(
        bool(url) or config.tokenizer is None,
        f"{name}.tokenizer is {config.tokenizer!r} but {name}.path is {config.path!r}, which has its own; unset it",
    )
    for setting in ("dtype", "attn_implementation", "liger", "device", "quantization"):
        value = getattr(config, setting)
        require(
            not url or value == getattr(TeacherConfig, setting),
            f"{name}.{setting} is {value!r} but {name}.server.url is {url!r}: the server decides about that; unset it",
        )


def check_objective(name: str, config: TeacherConfig, objective: Objective) -> None:
    """A server tells log-probs of some tokens; what compares whole distributions needs the model here."""
    require(
        not config.server.url or objective in ("sampled", "top_k"),
        f"loss.objective is {objective} but {name}.server.url is {config.server.url!r}: a server gives no distribution "
        f"over the whole vocabulary; set loss.objective to sampled or top_k, or {name}.path",
    )
