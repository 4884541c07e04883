"""The teacher of a run: loaded here or behind HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.errors import require
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.config.server import ServerConfig


@dataclass(frozen=True)
class TeacherServerConfig(ServerConfig):
    """A teacher behind HTTP: a completions server that gives log-probs of the prompt (vLLM).

    Args:
        api: How it is asked: prompt_logprobs (vLLM), echo (with logprobs), or auto: the first of them that it answers.
        sequences_per_request: Samples in one request.
    """

    api: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    sequences_per_request: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.sequences_per_request
        require(size >= 1, f"server.sequences_per_request is {size}; it must be at least 1")


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A model that only scores: loaded here, from `path`, or served elsewhere, by `server`.

    Args:
        server: The server in place of `path`; it decides about dtype and attention.
        tokenizer: Folder or Hub id of the served model's tokenizer; null: the server is asked.
    """

    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
    tokenizer: str | None = None


def check_teacher(name: str, config: TeacherConfig) -> None:
    """Exactly one of the model's folder and its server, and nothing that would be ignored."""
    url = config.server.url
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
    for setting in ("dtype", "attn_implementation", "liger"):
        value = getattr(config, setting)
        require(
            not url or value == getattr(ModelConfig, setting),
            f"{name}.{setting} is {value!r} but {name}.server.url is {url!r}: the server decides about that; unset it",
        )
