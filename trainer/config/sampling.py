"""Rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastkl.trainer.config.rules import at_least, fraction, positive, unchanged
from fastkl.trainer.config.server import ServerConfig
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class SamplingServerConfig(ServerConfig):
    """A vLLM server that samples, with the student's weights after every update.

    Args:
        model: Sample from the student that the server serves under this name. For LoRA: the base of the adapter.
        concurrency: Keep this many completions in flight.
        weights: Hand over the weights through this folder. This process writes it, and the server reads it under the same
            path. null: a folder in /dev/shm, which is memory, where the server is on this machine and there is room; else
            `weights` in the run folder.
        transfer: Send all weights from GPU to GPU by vLLM's own weight transfer, over NCCL or CUDA IPC
            (docs/teachers/servers.md). null: the server reads them from the folder.
    """

    concurrency: int = 64
    weights: str | None = None
    transfer: Literal["nccl", "ipc"] | None = None


@dataclass(frozen=True)
class EngineConfig:
    """How a model that is loaded here samples.

    Args:
        engine: Sample with Transformers' continuous_batching, where a new completion takes the place of an ended one, or
            with its generate, which samples whole batches and knows more kinds of models. auto: generate on a CPU
            (docs/speed/speed.md), and where a check at the start finds wrong log-probs of the other
            (docs/data/rollouts.md).
        max_batch_tokens: Limit a forward pass of continuous batching to this many tokens. If set, auto takes continuous
            batching on a CPU too.
        max_requests: Keep at most this many completions in progress. null: 64; on a CPU, continuous batching picks a
            smaller number (docs/speed/speed.md).
    """

    engine: Literal["auto", "continuous_batching", "generate"] = "auto"
    max_batch_tokens: int = 512
    max_requests: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "sampling.", "max_batch_tokens", "max_requests")
        if self.engine == "generate":
            reason = "sampling.engine is generate, which takes whole prompts; unset it, or set sampling.max_requests"
            unchanged(self, "sampling.", reason, ["max_batch_tokens"])

    def refuse_beside(self, setting: str, url: str, *more: str) -> None:
        """Refuses these settings, and `more` of them, where a server samples: its address is in `setting`."""
        flags = ", ".join(["--max-num-batched-tokens", "--max-num-seqs", *(f"--{name}" for name in more)])
        reason = f"{setting} is {url!r}: the server decides about that ({flags}); unset it"
        unchanged(self, "sampling.", reason, ("engine", "max_batch_tokens", "max_requests", *more))


@dataclass(frozen=True)
class CompletionsConfig(EngineConfig):
    """What `fastkl sample` writes after a prompt.

    Args:
        samples_per_prompt: Complete each prompt this many times.
        max_new_tokens: Limit the length of a completion.
        temperature: Sample at this temperature. 0: greedy.
    """

    samples_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "sampling.", "samples_per_prompt", "max_new_tokens")
        at_least(0, self, "sampling.", "temperature")
        require(
            self.temperature > 0 or self.samples_per_prompt == 1,
            f"sampling.samples_per_prompt is {self.samples_per_prompt} and sampling.temperature is 0: greedy completions "
            f"are all alike; raise the temperature, or unset sampling.samples_per_prompt",
        )


@dataclass(frozen=True)
class SamplingConfig(EngineConfig):
    """Rollouts of the student.

    Args:
        prompts_per_step: Take this many prompts in a step.
        samples_per_prompt: Complete each prompt this many times.
        max_new_tokens: Limit the length of a completion. In an environment: of all that follows the prompt.
        initial_new_tokens: Start with this limit, and raise it to max_new_tokens. null: the limit does not grow.
        growth_steps: Raise the limit linearly over this many steps.
        tokens_per_step: Write at most this many tokens of a completion in one step. An unfinished completion goes on in the
            next step, in addition to that step's prompts, and only its new tokens carry a loss. null: completions are
            written whole.
        on_policy_fraction: Let the student complete this share of a step's prompts. The others come with the completion in
            the data.
        given_coef: Weigh −log p of the tokens of given completions by this.
        drop_truncated: Leave out of the loss what reached the length limit.
        min_completion_tokens: Leave shorter completions out of the loss.
        max_completion_tokens: Leave longer completions out of the loss. null: none is too long.
        temperature: Sample at this temperature. It is also that of the loss, for student and teacher.
        top_p: Leave this at 1. The loss would not know the distribution that is sampled from.
        top_k: Leave this at 0, for the same reason.
        dtype: Sample from a copy of the student in this dtype, in evaluation too. The samples have its log-probs. null:
            sample from the student itself.
        server: Sample on this server. Without one, this process samples.
        steps_ahead: Ask the server for the samples of so many coming steps while the student learns. They are written by
            weights that are so many steps old (docs/data/rollouts.md). 0: each step samples first.
        max_staleness: Refuse samples that are written by weights more steps old than this. null: as old as steps_ahead
            makes them.
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
    dtype: Literal["bfloat16", "float16"] | None = None
    server: SamplingServerConfig = field(default_factory=SamplingServerConfig)
    steps_ahead: int = 0
    max_staleness: int | None = None

    @property
    def samples_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def filters(self) -> bool:
        """Whether completions may be left out of the loss."""
        return self.drop_truncated or self.min_completion_tokens > 0 or self.max_completion_tokens is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "sampling.", "prompts_per_step", "samples_per_prompt", "max_new_tokens")
        at_least(1, self, "sampling.", "initial_new_tokens", "tokens_per_step")
        positive(self, "sampling.", "temperature", "given_coef")
        fraction(self, "sampling.", "on_policy_fraction")
        if self.on_policy_fraction == 1:
            reason = "sampling.on_policy_fraction is 1: no completion is given; unset one of them"
            unchanged(self, "sampling.", reason, ["given_coef"])
        require(
            self.top_p == 1.0 and self.top_k == 0,
            f"sampling.top_p is {self.top_p} and sampling.top_k is {self.top_k}: either cuts off the distribution, its "
            f"log-probs are no longer the student's, and the importance ratio would be wrong. Leave top_p = 1 and "
            f"top_k = 0; lower sampling.temperature for less random samples",
        )
        if self.server.url:
            self.refuse_beside("sampling.server.url", self.server.url, "dtype")
        self._check_lengths()
        self._check_ahead()

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
                value is None or value < most,
                f"sampling.{name} is {value}; it must be below sampling.max_new_tokens ({most}), or null",
            )
        highest = most if self.max_completion_tokens is None else self.max_completion_tokens
        require(
            0 <= self.min_completion_tokens <= highest <= most and highest > 0,
            f"sampling.min_completion_tokens is {self.min_completion_tokens} and sampling.max_completion_tokens is "
            f"{self.max_completion_tokens}; they must be in order, within 0 and sampling.max_new_tokens ({most})",
        )

    def _check_ahead(self) -> None:
        at_least(0, self, "sampling.", "steps_ahead", "max_staleness")
        ahead = f"sampling.steps_ahead is {self.steps_ahead}"
        require(
            not self.steps_ahead or bool(self.server.url),
            f"{ahead}, but this process samples, which cannot learn at the same time. Start a server that samples and give "
            f"its address (sampling.server.url, docs/teachers/servers.md), or set sampling.steps_ahead to 0",
        )
        require(
            not self.steps_ahead or self.on_policy_fraction > 0,
            f"{ahead}, but sampling.on_policy_fraction is 0: there is nothing to sample; unset one of them",
        )
        require(
            self.max_staleness is None or self.steps_ahead <= self.max_staleness,
            f"{ahead}: samples would be so many steps old, and sampling.max_staleness is {self.max_staleness}; lower the "
            f"one or raise the other",
        )
