"""Optimizer, batches, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.rules import at_least, positive
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Args:
        lr: Set the peak learning rate.
        steps: Run this many steps.
        warmup_steps: Raise the learning rate linearly over the first of the `steps`. The first one already has
            lr / warmup_steps.
        schedule: Change the learning rate like this after the warm-up.
        weight_decay: Set AdamW's weight decay. Norms and biases do not decay.
        betas: Set AdamW's betas.
        max_grad_norm: Clip gradients to this norm. null: no clipping.
        substeps: Split the samples of a step into this many minibatches, with one optimizer step each.
        max_skipped: End the run after this many optimizer steps in a row whose gradient was not finite. Such a step is
            skipped.
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
        at_least(0, self, "optim.", "lr", "weight_decay")
        at_least(1, self, "optim.", "steps", "substeps", "max_skipped")
        positive(self, "optim.", "max_grad_norm")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas is {self.betas}; it must be two numbers, each at least 0 and below 1",
        )
        require(
            0 <= self.warmup_steps <= self.steps,
            f"optim.warmup_steps is {self.warmup_steps}; it must be between 0 and optim.steps ({self.steps})",
        )


@dataclass(frozen=True)
class BatchConfig:
    """How samples are laid out for a forward pass.

    Args:
        max_tokens: Limit a forward pass to this many tokens, padding included. Larger minibatches are accumulated.
        layout: Lay sequences end to end in one row (packed), or in rows of similar length (padded). auto: packed with flash
            attention, which computes it without waste, else padded; padded too where a check at the start finds that
            packed sequences of the model run into one another (docs/data/rollouts.md).
    """

    max_tokens: int = 16384
    layout: Literal["auto", "packed", "padded"] = "auto"

    def __post_init__(self) -> None:
        at_least(1, self, "batch.", "max_tokens")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from.

    Args:
        every: Write a checkpoint every N steps, and always after the last one. 0: only then.
        keep: Keep this many of the newest.
        best: Keep the one with the best eval/accuracy too (keep), and save its student at the end (student). null: neither.
    """

    every: int = 50
    keep: int = 1
    best: Literal["keep", "student"] | None = None

    def __post_init__(self) -> None:
        at_least(0, self, "checkpoint.", "every")
        at_least(1, self, "checkpoint.", "keep")
