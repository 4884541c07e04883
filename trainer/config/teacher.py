"""The teacher of a run: loaded here or behind HTTP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.loss import ObjectiveName
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require


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

    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
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


def check_objective(name: str, config: TeacherConfig, objective: ObjectiveName) -> None:
    """A server tells log-probs of some tokens; what compares whole distributions needs the model here."""
    require(
        not config.server.url or objective in ("policy_gradient", "top_k"),
        f"loss.objective is {objective} but {name}.server.url is {config.server.url!r}: a server gives no distribution "
        f"over the whole vocabulary; set loss.objective to policy_gradient or top_k, or {name}.path",
    )
