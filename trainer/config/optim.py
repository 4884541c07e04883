"""Optimizer, batches, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate.
        steps: Steps of the run.
        warmup_steps: Steps of linear warm-up, within `steps`; the first one already has lr / warmup_steps.
        schedule: Learning rate after the warm-up.
        weight_decay: Decoupled weight decay.
        betas: Adam's betas.
        max_grad_norm: Gradients are clipped to this norm; null for no clipping.
        substeps: Optimizer steps per step: the samples of a step are split into so many minibatches.
        max_skipped: Optimizer steps are skipped where the gradient is not finite; so many in a row end the run.
    """

    lr: float = 1e-4
    steps: int = 100
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float | None = 1.0
    substeps: int = 1
    max_skipped: int = 10

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"optim.lr is {self.lr}; it must be >= 0")
        require(self.steps >= 1, f"optim.steps is {self.steps}; it must be at least 1")
        require(self.substeps >= 1, f"optim.substeps is {self.substeps}; it must be at least 1")
        require(self.max_skipped >= 1, f"optim.max_skipped is {self.max_skipped}; it must be at least 1")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {self.betas}; it must be two numbers, each at least 0 and below 1",
        )
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it must be >= 0")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"optim.max_grad_norm is {self.max_grad_norm}; it must be > 0, or null for no clipping",
        )
        require(
            0 <= self.warmup_steps <= self.steps,
            f"optim.warmup_steps is {self.warmup_steps}; it must be between 0 and optim.steps ({self.steps})",
        )


@dataclass(frozen=True)
class BatchConfig:
    """How samples are laid out for a forward pass.

    Args:
        max_tokens: Tokens per forward (padding counted); larger minibatches are accumulated.
        layout: packed (sequences end to end in one row), padded (rows of similar length), or auto: packed where the
            attention implementation computes packed rows without waste (flash attention), else padded, which models
            with other layers than attention always need.
    """

    max_tokens: int = 16384
    layout: Literal["auto", "packed", "padded"] = "auto"

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"batch.max_tokens is {self.max_tokens}; it must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        every: Write one each so many steps, and after the last one; 0: only after the last one.
        keep: Keep the newest so many.
    """

    every: int = 50
    keep: int = 1

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every is {self.every}; it must be >= 0")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; it must be at least 1")
