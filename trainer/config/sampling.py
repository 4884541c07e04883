"""Rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require


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
        max_new_tokens: Length limit of a completion; of all that follows the prompt, where there is an environment.
        initial_new_tokens: Length limit in the first step, from which it grows to max_new_tokens; null: it does not grow.
        growth_steps: Steps until it has grown, linearly.
        tokens_per_step: New tokens of a completion in one step; an unfinished one goes on in the next step, in addition to
            that step's own prompts, and only its new tokens carry a loss. null: completions are not divided.
        on_policy_fraction: Share of a step's prompts that the student completes; the others come with the completion that
            the data give.
        given_coef: Weight of −log p of a given completion's tokens.
        drop_truncated: Leave completions that ran out of tokens out of the loss.
        min_completion_tokens: Leave shorter completions out of the loss.
        max_completion_tokens: Leave longer completions out of the loss; null: none.
        temperature: Sampling temperature, of student and teacher alike.
        top_p: Must stay 1: anything else samples from another distribution than the loss assumes.
        top_k: Must stay 0, for the same reason.
        engine: Transformers' continuous_batching, where an ended completion makes room for another; its generate, which
            samples whole batches, from more kinds of models; or auto: generate on a CPU (docs/speed.md) and for
            models that the other cannot sample from.
        max_batch_tokens: Tokens in one forward pass of continuous batching, which auto then takes on a CPU too.
        max_requests: Completions in progress at once; null: 64, or for continuous batching on a CPU as many as do not get
            in each other's way (docs/speed.md).
        dtype: Dtype of a copy of the student that samples in its place, evaluation included, for a student in float32; its
            log-probs are those of the samples. null: the student itself samples.
        server: A server that samples; without one, this process does.
    """

    prompts_per_step: int = 64
    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    initial_new_tokens: int | None = None
    growth_steps: int = 0
    tokens_per_step: int | None = None
    on_policy_fraction: float = 1.0
    given_coef: float = 1.0
    drop_truncated: bool = False
    min_completion_tokens: int = 0
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    engine: Literal["auto", "continuous_batching", "generate"] = "auto"
    max_batch_tokens: int = 512
    max_requests: int | None = None
    dtype: Literal["bfloat16", "float16"] | None = None
    server: SamplingServerConfig = field(default_factory=SamplingServerConfig)

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

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
        for name in ("engine", "max_batch_tokens", "max_requests", "dtype"):
            value = getattr(self, name)
            require(
                not self.server.url or value == getattr(SamplingConfig, name),
                f"sampling.{name} is {value} but sampling.server.url is {self.server.url!r}: the server decides about that "
                f"(--max-num-batched-tokens, --max-num-seqs, --dtype); unset it",
            )
        require(
            self.engine != "generate" or self.max_batch_tokens == SamplingConfig.max_batch_tokens,
            f"sampling.max_batch_tokens is {self.max_batch_tokens} but sampling.engine is 'generate', which takes whole "
            f"prompts; unset it, or set sampling.max_requests",
        )
        self._check_lengths()
        require(
            0 <= self.on_policy_fraction <= 1,
            f"sampling.on_policy_fraction is {self.on_policy_fraction}; it must be between 0 and 1",
        )
        require(
            math.isfinite(self.given_coef) and self.given_coef > 0,
            f"sampling.given_coef is {self.given_coef}; it must be > 0 and finite; for no given completions set "
            f"sampling.on_policy_fraction to 1",
        )
        require(
            self.on_policy_fraction < 1 or self.given_coef == 1.0,
            f"sampling.given_coef is {self.given_coef} but sampling.on_policy_fraction is 1: no completion is given; "
            f"lower the fraction or leave given_coef at 1",
        )

    @property
    def filters(self) -> bool:
        """Whether completions may be left out of the loss."""
        return self.drop_truncated or self.min_completion_tokens > 0 or self.max_completion_tokens is not None

    def _check_lengths(self) -> None:
        most = self.max_new_tokens
        require(
            (self.initial_new_tokens is None) == (self.growth_steps == 0) and self.growth_steps >= 0,
            f"sampling.initial_new_tokens is {self.initial_new_tokens} and sampling.growth_steps is {self.growth_steps}; "
            f"set both for a limit that grows, or neither",
        )
        for name in ("initial_new_tokens", "tokens_per_step"):
            value = getattr(self, name)
            require(
                value is None or 1 <= value < most,
                f"sampling.{name} is {value}; it must be at least 1 and below sampling.max_new_tokens ({most}), or null",
            )
        highest = most if self.max_completion_tokens is None else self.max_completion_tokens
        require(
            0 <= self.min_completion_tokens <= highest <= most and highest > 0,
            f"sampling.min_completion_tokens is {self.min_completion_tokens} and sampling.max_completion_tokens is "
            f"{self.max_completion_tokens}; they must be in order, within 0 and sampling.max_new_tokens ({most})",
        )
