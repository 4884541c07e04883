"""The teacher of a run: loaded here or behind HTTP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.loss import SERVED, ObjectiveName
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class TeacherServerConfig(ServerConfig):
    """A teacher behind HTTP: a completions server that gives log-probs of the prompt (vLLM).

    Args:
        api: Ask in this way: prompt_logprobs (vLLM), echo (with logprobs), or auto, the first of them that works.
        sequences_per_request: Send this many samples in one request.
        recheck_every: Compare the server's log-probs of a text with those at the start after this many steps, after
            every lost connection, and after the last step. 0: only after those.
    """

    api: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    sequences_per_request: int = 8
    recheck_every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "server.", "sequences_per_request")
        at_least(0, self, "server.", "recheck_every")


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A model that only scores: loaded here (`path`), served elsewhere (`server`), or the student's own base.

    Args:
        server: Ask this server instead of loading `path`. The server decides about dtype and attention.
        tokenizer: Load the served model's tokenizer from this folder or Hub id. null: ask the server.
        base_of_student: Use the model under the student's LoRA adapter instead of `path`. It is the student with its
            adapter off, not a second copy.
        device: Load the model on this device: cpu, cuda:1, … null: the student's.
        quantization: Load the blocks in 8 or 4 bits (package bitsandbytes), but not the head. null: as they are in the
            folder, which may be quantised already.
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
        reason = (
            f"{name}.base_of_student is true: the teacher is the student's model as it was loaded; unset one of them"
        )
        unchanged(dataclasses.replace(config, base_of_student=False), f"{name}.", reason)
        return
    require(
        bool(config.path or url),
        f"{name}.path is empty and so is {name}.server.url; give a model folder or a Hub id, or a server's url",
    )
    require(
        not (config.path and url),
        f"{name}.path is {config.path!r} and {name}.server.url is {url!r}; give exactly one of them",
    )
    if url:
        decided = ("dtype", "attn_implementation", "liger", "device", "quantization")
        unchanged(config, f"{name}.", f"{name}.server.url is {url!r}: the server decides about that; unset it", decided)
    else:
        unchanged(config, f"{name}.", f"{name}.path is {config.path!r}, which has its own; unset it", ["tokenizer"])


def check_objective(name: str, config: TeacherConfig, objective: ObjectiveName) -> None:
    """A server tells log-probs of some tokens. What compares whole distributions needs the model here."""
    require(
        not config.server.url or objective in SERVED,
        f"loss.objective is {objective}, but {name}.server.url is {config.server.url!r}: a server gives no distribution "
        f"over the whole vocabulary; set loss.objective to {' or '.join(SERVED)}, or load the teacher from {name}.path",
    )
