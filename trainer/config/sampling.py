"""Rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastkl.trainer.config.errors import require
from fastkl.trainer.config.server import ServerConfig


@dataclass(frozen=True)
class SamplingServerConfig(ServerConfig):
    """A vLLM server that samples in place of this process, with the student's weights after every update.

    Args:
        model: Name under which the server serves the student, or what a LoRA student is an adapter on.
        concurrency: Completions in flight at once.
        weights: Folder through which the weights go: this process writes, the server reads it under the same path.
            null: `weights` in the run folder.
    """

    concurrency: int = 64
    weights: str | None = None


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
        max_requests: Completions in progress at once; null: 64, or fewer on a CPU, where long ones get in each other's way.
        server: A server that samples; without one, this process does, with the student itself.
    """

    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_batch_tokens: int = 512
    max_requests: int | None = None
    server: SamplingServerConfig = field(default_factory=SamplingServerConfig)

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
        for name in ("max_batch_tokens", "max_requests"):
            value = getattr(self, name)
            require(
                not self.server.url or value == getattr(SamplingConfig, name),
                f"sampling.{name} is {value} but sampling.server.url is {self.server.url!r}: the server decides about that "
                f"(--max-num-batched-tokens, --max-num-seqs); unset it",
            )
