"""The models of a run: the student, and what every model has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.config.sampling import EngineConfig
from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (peft) on a frozen base model.

    Args:
        rank: Set the rank of the adapter. 0: train all weights, without an adapter.
        alpha: Scale the adapter by alpha / rank.
        target_modules: Adapt the layers of these names, or "all-linear" (all but the LM head).
    """

    rank: int = 0
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        at_least(0, self, "lora.", "rank")
        if self.rank == 0:
            unchanged(self, "lora.", "lora.rank is 0, which trains all weights; set lora.rank")


@dataclass(frozen=True)
class ModelConfig:
    """A Transformers causal LM.

    Args:
        path: Load the model from this folder or Hub id.
        dtype: Hold the weights in this dtype.
        attn_implementation: Use this attention of Transformers. null: its default.
        trust_remote_code: Allow Python code that comes with the model to run.
        liger: Use Liger kernels for the blocks (CUDA only, package liger-kernel).
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    liger: bool = False


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The model that is trained.

    Args:
        gradient_checkpointing: Recompute activations in the backward pass. It takes less memory and more time.
        dropout: Switch off whatever the model drops or draws at random in an update (off), or keep it (keep). Completions
            are always sampled without: with keep, an update sees another distribution than was sampled.
        lora: Train a LoRA adapter instead of all weights.
    """

    gradient_checkpointing: bool = False
    dropout: Literal["off", "keep"] = "off"
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class WritingServerConfig(ServerConfig):
    """A vLLM server that writes completions.

    Args:
        concurrency: Keep this many completions in flight.
    """

    concurrency: int = 64


@dataclass(frozen=True)
class WriterConfig(ModelConfig):
    """A model that writes: loaded here (`path`), or served elsewhere (`server`).

    Args:
        server: Ask this server instead of loading `path`. The server decides about dtype and attention.
        tokenizer: Load the served model's tokenizer from this folder or Hub id.
    """

    server: WritingServerConfig = field(default_factory=WritingServerConfig)
    tokenizer: str | None = None

    def check(self, sampling: EngineConfig) -> None:
        """Exactly one of folder and server; with a server a tokenizer, and nothing that the server decides about."""
        path, url = self.path, self.server.url
        require(
            bool(path.strip()) or bool(url), "model.path is empty; give a model folder or a Hub id, or model.server.url"
        )
        require(not (path and url), f"model.path is {path!r} and model.server.url is {url!r}; give one of them")
        require(
            bool(url) == (self.tokenizer is not None),
            f"model.tokenizer is {self.tokenizer!r} and model.server.url is {url!r}: a served model needs its tokenizer "
            f"here, a folder or a Hub id, and a model that is loaded here has its own",
        )
        if url:
            reason = f"model.server.url is {url!r}: the server decides about that; unset it"
            unchanged(self, "model.", reason, ("dtype", "attn_implementation", "liger"))
            sampling.refuse_beside("model.server.url", url)
