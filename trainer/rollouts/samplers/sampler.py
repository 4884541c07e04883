"""A sampler as the loop sees it: something that completes prompts, and says how likely each token was."""

from __future__ import annotations

from typing import Protocol

from fastkl.trainer.data.samples import Completion


class Sampler(Protocol):
    """Anything that completes prompts and says how likely each token was."""

    shared: bool
    """Whether each process samples, its part of the prompts; else the first samples all of them."""

    def refresh(self) -> None:
        """Takes over the model's current weights where it holds a copy of them; `sample` does so by itself."""
        ...

    def sample(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[Completion]:
        """One completion per prompt, in order; the same ones for the same weights and seed. Temperature 0 is greedy."""
        ...
