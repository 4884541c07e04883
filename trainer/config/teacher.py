"""The teacher of a run: loaded here or behind HTTP."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.context import ContextConfig
from fastkl.trainer.config.loss import SERVED, LossConfig
from fastkl.trainer.config.models import ModelConfig, StudentConfig
from fastkl.trainer.config.rules import at_least, positive, unchanged
from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require

OWN = "own"  # what `tokenizer` begins with where it is not the student's


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
    """A model that only scores: loaded here (`path`), served elsewhere (`server`), or the student itself (`self`).

    Args:
        server: Ask this server instead of loading `path`. The server decides about dtype and attention.
        tokenizer: Load the served model's tokenizer from this folder or Hub id. null: ask the server. own: let a teacher
            from `path` read texts by a tokenizer that is not the student's (docs/teachers/tokenizers.md). own:FOLDER: the
            same of a served one.
        self: Let the student teach itself instead of loading `path`: with the weights under its LoRA adapter (base), those
            that it has (live), an exponential average of them (ema), or those of some steps ago (synced).
        ema_rate: Move the average of ema this part of the way to the student after every optimizer step.
        sync_every: Give the teacher of synced the student's weights after every so many steps.
        device: Load the model on this device: cpu, cuda:1, … null: the student's. Also for the weights of ema and synced.
        quantization: Load the blocks in 8 or 4 bits (package bitsandbytes), but not the head. null: as they are in the
            folder, which may be quantised already.
        context: Let the teacher read another prompt than the student.
        cache: Keep its scores in this folder, and read from there what it has scored before, in this run or another. null:
            score everything.
        cache_gigabytes: Forget the scores that were kept first when the folder would hold more than this.
    """

    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
    tokenizer: str | None = None
    self: Literal["base", "live", "ema", "synced"] | None = None
    ema_rate: float | None = None
    sync_every: int | None = None
    device: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    context: ContextConfig = field(default_factory=ContextConfig)
    cache: str | None = None
    cache_gigabytes: float = 20.0

    @property
    def follows_student(self) -> bool:
        """Whether it has weights of its own, made of the student's."""
        return self.self in ("ema", "synced")

    @property
    def own_tokenizer(self) -> bool:
        """Whether it reads texts by a tokenizer that is not the student's."""
        return self.tokenizer == OWN or (self.tokenizer or "").startswith(f"{OWN}:")

    @property
    def tokenizer_path(self) -> str:
        """The folder or Hub id of its tokenizer; "" where only a server knows."""
        return self.path or (self.tokenizer or "").removeprefix(f"{OWN}:")

    @property
    def scorer(self) -> TeacherConfig:
        """What is loaded or asked, whatever it reads."""
        return dataclasses.replace(self, context=ContextConfig())


@dataclass(frozen=True)
class ReferenceConfig(ModelConfig):
    """A model that only scores, beside the teacher: loaded here (`path`), or the student's own base (`self`).

    Args:
        self: Use the weights under the student's LoRA adapter (base) instead of loading `path`.
        device: Load the model on this device: cpu, cuda:1, … null: the student's.
        quantization: Load the blocks in 8 or 4 bits (package bitsandbytes), but not the head. null: as they are in the
            folder, which may be quantised already.
    """

    self: Literal["base"] | None = None
    device: str | None = None
    quantization: Literal["8bit", "4bit"] | None = None


def as_teacher(config: ReferenceConfig) -> TeacherConfig:
    """A reference is opened and asked as a teacher is."""
    return TeacherConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


RATES = {"ema_rate": "ema", "sync_every": "synced"}  # a setting of one kind of `self`
OF_SELF = ("self", *RATES, "device", "context", "cache", "cache_gigabytes")


def check_teacher(name: str, config: TeacherConfig) -> None:
    """Exactly one of folder, server and the student itself, and nothing that would be ignored."""
    url = config.server.url
    if config.cache is None:
        unchanged(config, f"{name}.", f"{name}.cache is null; name its folder, or unset this", ["cache_gigabytes"])
    require(config.cache is None or bool(config.cache.strip()), f"{name}.cache is empty; name a folder, or unset it")
    positive(config, f"{name}.", "cache_gigabytes")
    if not config.own_tokenizer:
        reason = (
            f"{name}.tokenizer is {config.tokenizer or 'null'}: the student's template writes its prompts; unset it"
        )
        unchanged(config.context, f"{name}.context.", reason, ["template_kwargs"])
    for setting, kind in RATES.items():
        reason = f"{name}.self is {config.self or 'null'}: it belongs to {kind}; unset it or set {name}.self to {kind}"
        unchanged(config, f"{name}.", reason, [setting] if config.self != kind else [])
    if config.self is not None:
        _check_self(name, config)
        return
    require(
        bool(config.path or url),
        f"{name}.path is empty and so is {name}.server.url; give a model folder or a Hub id, or a server's url; or set "
        f"{name}.self",
    )
    require(
        not (config.path and url),
        f"{name}.path is {config.path!r} and {name}.server.url is {url!r}; give exactly one of them",
    )
    if url:
        decided = ("dtype", "attn_implementation", "liger", "device", "quantization")
        unchanged(config, f"{name}.", f"{name}.server.url is {url!r}: the server decides about that; unset it", decided)
        require(
            not config.own_tokenizer or config.tokenizer_path not in ("", OWN),
            f"{name}.tokenizer is {config.tokenizer!r}, but {name}.server.url is {url!r}, and texts are encoded here; name "
            f"the folder or Hub id of the served model's tokenizer: {OWN}:FOLDER",
        )
    elif config.tokenizer != OWN:
        reason = (
            f"{name}.path is {config.path!r}, which has one; unset it, or set it to {OWN} if it is not the student's"
        )
        unchanged(config, f"{name}.", reason, ["tokenizer"])


def _check_self(name: str, config: TeacherConfig) -> None:
    """The student's own weights, and what says how they follow it."""
    reason = f"{name}.self is {config.self}: it is the student, with its settings; unset one of them"
    other = [field.name for field in dataclasses.fields(config) if field.name not in OF_SELF]
    unchanged(config, f"{name}.", reason, other)
    require(
        config.cache is None or config.self == "base",
        f"{name}.cache is {config.cache!r}, but {name}.self is {config.self}: its weights move with the student, and what "
        f"it said before is not what it says now; unset one of them",
    )
    if config.self == "ema":
        rate = config.ema_rate
        require(rate is not None, f"{name}.self is ema, but {name}.ema_rate is null; set it, for example to 0.05")
        require(
            rate is not None and 0 < rate < 1,
            f"{name}.ema_rate is {rate}; it must be above 0 and below 1. At 1 the average is the student: set {name}.self "
            f"to live. At 0 it never moves: set {name}.self to base, or {name}.path to the student's",
        )
    if config.self == "synced":
        every = config.sync_every
        require(every is not None, f"{name}.self is synced, but {name}.sync_every is null; set it, for example to 10")
        require(
            every is not None and every >= 2,
            f"{name}.sync_every is {every}; it must be at least 2. For the student as it is set {name}.self to live; for "
            f"weights that stay as they were loaded to base, or {name}.path to the student's",
        )


def check_self_of(name: str, config: TeacherConfig, student: StudentConfig) -> None:
    """The student has the weights that `self` asks for, where they are asked for."""
    full = student.lora.rank == 0
    require(
        config.self != "base" or not full,
        f"{name}.self is base, but student.lora.rank is 0: the base itself is trained; set student.lora.rank, or "
        f"{name}.path to the base",
    )
    require(
        config.self is None or config.device is None or (full and config.follows_student),
        f"{name}.device is {config.device!r}, but {name}.self is {config.self} and student.lora.rank is "
        f"{student.lora.rank}: it shares the student's weights and is where they are; unset it",
    )


def check_reference(config: ReferenceConfig, loss: LossConfig, student: StudentConfig) -> None:
    """It is there where the loss asks for it, and nowhere else."""
    if loss.extrapolate == 1:
        unchanged(
            config, "reference.", "loss.extrapolate is 1, which asks no reference; unset it, or set loss.extrapolate"
        )
        return
    require(
        bool(config.path) or config.self is not None,
        f"loss.extrapolate is {loss.extrapolate}, but reference.path is empty; give a model folder or a Hub id, or set "
        f"reference.self",
    )
    check_teacher("reference", as_teacher(config))
    check_self_of("reference", as_teacher(config), student)


def check_loss(name: str, config: TeacherConfig, loss: LossConfig) -> None:
    """A server or a cache tells log-probs of some tokens. What compares whole distributions needs the model here."""
    whole = "loss.baseline is kl" if loss.baseline == "kl" else f"loss.objective is {loss.objective}"
    require(
        config.cache is None or (loss.objective in SERVED and loss.baseline != "kl"),
        f"{name}.cache is {config.cache!r}, but {whole}, which reads whole distributions: none can be kept; unset one of "
        f"them",
    )
    served = f"{name}.server.url is {config.server.url!r}: a server gives no distribution over the whole vocabulary"
    require(
        not config.server.url or loss.objective in SERVED,
        f"loss.objective is {loss.objective}, but {served}; set loss.objective to {' or '.join(SERVED)}, or load the "
        f"teacher from {name}.path",
    )
    require(
        not config.server.url or loss.baseline != "kl",
        f"loss.baseline is kl, but {served}; set loss.baseline to mean, or load the teacher from {name}.path",
    )
