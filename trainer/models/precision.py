"""Weights of 16 bits, which an update smaller than their precision leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SAMPLE = 256  # weights of a tensor
MANY = 0.5  # of the weights: the first updates of Adam are its largest


class Counts:
    """Of the weights that were looked at: how many had a gradient, and how many of those an optimizer step left."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._coarse = [p for p in parameters if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        self.seen = self.unchanged = 0

    @contextmanager
    def around_step(self) -> Iterator[None]:
        """Looks at the weights before and after."""
        before = [_some(p) for p in self._coarse if p.grad is not None]
        moving = [_some(p.grad) != 0 for p in self._coarse if p.grad is not None]
        yield
        after = [_some(p) for p in self._coarse if p.grad is not None]
        if before:
            moved, same = torch.cat(moving), torch.cat(before) == torch.cat(after)
            self.seen += int(moved.sum())
            self.unchanged += int((moved & same).sum())


def unchanged_fraction(parts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """`optim/unchanged` from the processes' (seen, unchanged); nothing where no weight was looked at."""
    seen, unchanged = (sum(numbers) for numbers in zip(*parts, strict=True))
    return {"optim/unchanged": unchanged / seen} if seen else {}


def too_small_an_update(metrics: dict[str, float], lr: float) -> str | None:
    """A warning where weights cannot hold what they are to learn; None where they can, or are of 32 bits."""
    unchanged = metrics.get("optim/unchanged", 0.0)
    if unchanged <= MANY or lr == 0:
        return None
    return (
        f"{unchanged:.0%} of the student's weights did not change in this update: at optim.lr {lr:g} it is below the "
        f"precision of their 16 bits. Set student.dtype to float32 (with mixed_precision bf16), or train a LoRA adapter "
        f"(student.lora.rank)"
    )


def _some(tensor: Tensor) -> Tensor:
    """A sample of a tensor's entries, of this process's shard of it."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().flatten()
    return local[:: max(1, len(local) // SAMPLE)].clone()
