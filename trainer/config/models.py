"""The models of a run: the student, and what every model has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter (peft) on a frozen base model.

    Args:
        rank: Rank of the adapter; 0 trains all weights instead.
        alpha: Scale of the adapter; it counts alpha / rank.
        target_modules: Names of the layers that get one, or "all-linear" (the LM head excepted).
    """

    rank: int = 0
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank is {self.rank}; it must be >= 0 (0: no LoRA)")
        require(
            self.rank > 0 or (self.alpha, self.target_modules) == (32.0, "all-linear"),
            f"lora.alpha is {self.alpha} and lora.target_modules is {self.target_modules!r}, but lora.rank is 0, which "
            f"trains all weights; set lora.rank",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A Transformers causal LM.

    Args:
        path: Folder or Hub id.
        dtype: Dtype the weights are held in.
        attn_implementation: Transformers' name of the attention; null for its default.
        trust_remote_code: Run Python code that comes with the model. Off unless you say so.
        liger: Liger kernels for the blocks (CUDA only, package liger-kernel).
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
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        lora: LoRA instead of training all weights.
    """

    gradient_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
