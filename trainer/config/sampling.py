"""Rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from fastkl.trainer.config.errors import require


@dataclass(frozen=True)
class SamplingConfig:
    """Rollouts of the student.

    Args:
        prompts_per_step: Prompts per step.
        samples_per_prompt: Completions of each prompt.
        max_new_tokens: Length limit of a completion.
        temperature: Sampling temperature, of student and teacher alike.
        top_p: Must stay 1: anything else samples from another distribution than the loss assumes.
        top_k: Must stay 0, for the same reason.
        max_batch_tokens: Tokens in one forward pass of the sampling engine.
        max_requests: Completions in progress at once; null: 64, or on a CPU as many as do not get in each
            other's way (docs/trainer-speed.md).
    """

    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_batch_tokens: int = 512
    max_requests: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples_per_prompt", "max_new_tokens", "max_batch_tokens"):
            require(getattr(self, name) >= 1, f"sampling.{name} is {getattr(self, name)}; it must be at least 1")
        require(
            self.max_requests is None or self.max_requests >= 1,
            f"sampling.max_requests is {self.max_requests}; it must be at least 1, or null",
        )
        require(self.temperature > 0, f"sampling.temperature is {self.temperature}; on-policy sampling needs > 0")
        require(
            self.top_p == 1.0 and self.top_k == 0,
            f"sampling.top_p is {self.top_p} and sampling.top_k is {self.top_k}: with either, samples come from a cut-off "
            f"distribution whose log-probs are not the student's, and the importance ratio would be wrong. Leave top_p = 1 "
            f"and top_k = 0; lower sampling.temperature for less random samples",
        )
