"""What a run is made of. Every field can be set in the YAML file or on the command line (`--optim.lr 1e-4`)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from fastkl.kernels.surrogate import Method


class ConfigError(ValueError):
    """A setting that cannot work, with its name, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


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


@dataclass(frozen=True)
class ServerConfig:
    """A teacher behind HTTP: an OpenAI-compatible completions server that gives log-probs of the prompt (vLLM).

    Args:
        url: Base address as OpenAI's clients take it, for example http://127.0.0.1:8000/v1.
        model: Name under which the server serves the teacher.
        api: How it is asked: prompt_logprobs (vLLM), echo (with logprobs), or auto: the first of them that it answers.
        sequences_per_request: Samples in one request.
        concurrency: Requests in flight at once.
        timeout: Seconds without an answer after which a request is sent again.
        retries: How often it is sent again (after a lost connection, no answer in time, status 408, 425, 429 or 5xx),
            with pauses of 1, 2, 4, … up to 30 seconds.
        api_key_env: Name of the environment variable that holds the API key; null sends none. The key itself is never
            written anywhere.
    """

    url: str = ""
    model: str = ""
    api: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    sequences_per_request: int = 8
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        for name in ("sequences_per_request", "concurrency"):
            require(getattr(self, name) >= 1, f"server.{name} is {getattr(self, name)}; it must be at least 1")
        require(self.timeout > 0, f"server.timeout is {self.timeout}; it must be > 0 seconds")
        require(self.retries >= 0, f"server.retries is {self.retries}; it must be >= 0 (0: no second attempt)")
        require(
            self.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env, re.ASCII) is not None,
            "server.api_key_env is not the name of an environment variable; put the key into one and give its name here",
        )
        if not self.url:
            for name, value in vars(self).items():
                changed = value != getattr(ServerConfig, name)
                require(not changed, f"server.{name} is {value!r} but server.url is empty; give the server's url")
            return
        parts = urlsplit(self.url)
        require(
            "@" not in parts.netloc and not parts.query,
            "server.url holds a user or a query, which config.yaml would show; put a key into an environment variable and "
            "its name into server.api_key_env",
        )
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"server.url is {self.url!r}; it must begin with http:// or https://, for example http://127.0.0.1:8000/v1",
        )
        require(bool(self.model), f"server.model is empty; give the name under which {self.url} serves the model")


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """A model that only scores: loaded here, from `path`, or served elsewhere, by `server`.

    Args:
        server: The server in place of `path`; it decides about dtype and attention.
        tokenizer: Folder or Hub id of the served model's tokenizer; null: the server is asked.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    tokenizer: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Prompts: a JSONL file or a data set of the `datasets` package.

    Each row has `prompt` (text) or `messages` (a chat), and optionally `answer` and `completion`.

    Args:
        path: JSONL file.
        dataset: Name of a data set for `datasets.load_dataset`, in place of `path`.
        split: Its split.
        chat_template: Wrap a text `prompt` as a user's turn in the tokenizer's chat template.
        max_prompt_tokens: Leave out prompts longer than this; null keeps all.
        limit: Use the first rows only; null uses all.
    """

    path: str | None = None
    dataset: str | None = None
    split: str = "train"
    chat_template: bool = True
    max_prompt_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name} is {value}; it must be at least 1, or null")


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


@dataclass(frozen=True)
class LossConfig:
    """The policy-gradient step on the reverse KL (`fastkl.loss.policy_gradient_loss`).

    Args:
        method: importance_sampling, reinforce, ppo or cispo.
        kl_coef: Weight of the reverse KL in the advantage. 0 leaves nothing to learn from.
        discount: Discount of future tokens' KL; 0 lets each token answer for itself.
        old_logprobs: What the ratio is taken against: the sampler's log-probs, those of a forward of the trainer before
            the update (recompute), or the policy itself (current: ratio 1).
        clip_low: Lower clip of ppo and cispo.
        clip_high: Upper clip of ppo and cispo.
        dual_clip: Dual clip of ppo; null for none.
        truncate_ratio: Cap of the importance ratio; null for none.
    """

    method: Method = "importance_sampling"
    kl_coef: float = 1.0
    discount: float = 0.0
    old_logprobs: Literal["sampler", "recompute", "current"] = "sampler"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    truncate_ratio: float | None = None

    def __post_init__(self) -> None:
        require(
            self.truncate_ratio is None or self.old_logprobs != "current",
            f"loss.truncate_ratio is {self.truncate_ratio} but loss.old_logprobs is current, where the ratio is 1; "
            f"unset one of them",
        )
        require(
            self.truncate_ratio is None or self.truncate_ratio > 0,
            f"loss.truncate_ratio is {self.truncate_ratio}; it must be > 0, or null for no cap",
        )
        require(
            0 <= self.clip_low <= 1 and self.clip_high >= 0,
            f"loss.clip_low is {self.clip_low} and loss.clip_high is {self.clip_high}; clip_low must be between 0 and 1 "
            f"and clip_high >= 0",
        )
        require(
            self.dual_clip is None or (self.method == "ppo" and self.dual_clip > 1),
            f"loss.dual_clip is {self.dual_clip} with loss.method {self.method}; it must be > 1 and belongs to ppo",
        )
        require(
            self.method in ("ppo", "cispo") or (self.clip_low, self.clip_high) == (0.2, 0.2),
            f"loss.clip_low is {self.clip_low} and loss.clip_high is {self.clip_high}, but loss.method is {self.method}, "
            f"which clips nothing; they belong to ppo and cispo",
        )
        require(
            self.method not in ("ppo", "cispo") or self.old_logprobs != "current",
            f"loss.method is {self.method} but loss.old_logprobs is current, where the ratio is 1 and nothing is ever "
            f"clipped; use sampler or recompute",
        )
        require(
            self.kl_coef >= 0, f"loss.kl_coef is {self.kl_coef}; it must be >= 0: below, the student flees the teacher"
        )
        require(0 <= self.discount <= 1, f"loss.discount is {self.discount}; it must be between 0 and 1")


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
    """

    lr: float = 1e-4
    steps: int = 100
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float | None = 1.0
    substeps: int = 1

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"optim.lr is {self.lr}; it must be >= 0")
        require(self.steps >= 1, f"optim.steps is {self.steps}; it must be at least 1")
        require(self.substeps >= 1, f"optim.substeps is {self.substeps}; it must be at least 1")
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
            attention implementation computes packed rows without waste (flash attention), else padded.
    """

    max_tokens: int = 16384
    layout: Literal["auto", "packed", "padded"] = "auto"

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, f"batch.max_tokens is {self.max_tokens}; it must be at least 1")


@dataclass(frozen=True)
class EvalConfig:
    """Sampled answers to held-out prompts, scored by a named function.

    Args:
        data: Prompts with an `answer` each; without path or dataset there is no evaluation.
        grader: Scores a completion against the answer (see `fastkl.trainer.graders`).
        every: Evaluate each so many steps, and before the first and after the last one; 0: only those two.
        max_new_tokens: Length limit of an answer.
        temperature: 0 is greedy.
    """

    data: DataConfig = field(default_factory=DataConfig)
    grader: str = "last_number"
    every: int = 0
    max_new_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        require(self.every >= 0, f"eval.every is {self.every}; it must be >= 0")
        require(self.max_new_tokens >= 1, f"eval.max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        require(self.temperature >= 0, f"eval.temperature is {self.temperature}; it must be >= 0 (0: greedy)")


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


@dataclass(frozen=True)
class RunConfig:
    """What every training run has.

    Args:
        run: Run folder. The same config resumes in it; another one is refused.
        seed: Seed of prompts' order, sampling and initialisation.
        student: The model that is trained.
        data: Where its prompts come from.
        optim: Optimizer and schedule.
        batch: Layout of a forward pass.
        eval: Evaluation on held-out prompts.
        checkpoint: Checkpoints.
        mixed_precision: Autocast of the forward pass (accelerate's option).
        trackers: accelerate's trackers beside metrics.jsonl, for example [tensorboard, wandb].
        log_samples: Samples of each step that are written to samples.jsonl.
    """

    run: str
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    trackers: list[str] = field(default_factory=list)
    log_samples: int = 4

    def __post_init__(self) -> None:
        require(bool(self.run), "run is empty; name the run folder, for example runs/first")
        require(bool(self.student.path), "student.path is empty; give a model folder or a Hub id")
        check_source("data", self.data)
        require(self.log_samples >= 0, f"log_samples is {self.log_samples}; it must be >= 0")


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """On-policy distillation: the student samples, the teacher scores, the student learns from the reverse KL.

    Args:
        teacher: The model that scores the student's tokens; it is never trained.
        sampling: Rollouts of the student.
        loss: The policy-gradient step.
    """

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher("teacher", self.teacher)
        samples = self.sampling.prompts_per_step * self.sampling.samples_per_prompt
        require(
            samples >= self.optim.substeps,
            f"optim.substeps is {self.optim.substeps}, more than the {samples} samples of a step; raise "
            f"sampling.prompts_per_step or lower optim.substeps",
        )


@dataclass(frozen=True)
class SftConfig(RunConfig):
    """Supervised fine-tuning on given completions: the off-policy stage before distillation.

    Args:
        examples_per_step: Examples per step.
    """

    examples_per_step: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.examples_per_step >= self.optim.substeps,
            f"examples_per_step is {self.examples_per_step}, less than optim.substeps ({self.optim.substeps})",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Grading a model's answers.

    Args:
        model: The model that answers.
        eval: Prompts with answers, and the grader.
        output: JSONL file for the graded answers; it must not exist. null: only the summary is printed.
        seed: Seed of sampling, where eval.temperature is above 0.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    output: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.model.path), "model.path is empty; give a model folder or a Hub id")
        check_source("eval.data", self.eval.data)


@dataclass(frozen=True)
class ScoreConfig:
    """Log-probs of given completions, each with its end-of-sequence token.

    Args:
        model: The model that scores; a served one needs `tokenizer`.
        data: Rows with `prompt` or `messages`, and `completion`.
        output: JSONL file to write; it must not exist.
        temperature: The log-probs are those at this temperature.
        batch: Layout of a forward pass.
    """

    output: str
    model: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    temperature: float = 1.0
    batch: BatchConfig = field(default_factory=BatchConfig)

    def __post_init__(self) -> None:
        check_teacher("model", self.model)
        require(
            bool(self.model.path or self.model.tokenizer),
            f"model.tokenizer is {self.model.tokenizer!r} and model.server.url is {self.model.server.url!r}; give the "
            f"tokenizer's folder or Hub id: the completions are encoded here",
        )
        require(bool(self.output), "output is empty; name the JSONL file to write")
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be > 0")
        check_source("data", self.data)


@dataclass(frozen=True)
class ReportConfig:
    """A page about one run, or about several on the same axes.

    Args:
        runs: Run folders.
        output: HTML file to write, in place of an older report if need be; null: report.html in the one run's folder.
    """

    runs: list[str]
    output: str | None = None

    def __post_init__(self) -> None:
        require(
            self.output is not None or len(self.runs) == 1,
            f"output is not set and there are {len(self.runs)} runs; name the page to write with --output FILE",
        )


def check_source(name: str, data: DataConfig) -> None:
    require(
        (data.path is None) != (data.dataset is None),
        f"{name}.path is {data.path!r} and {name}.dataset is {data.dataset!r}; give exactly one of them",
    )


def check_teacher(name: str, config: TeacherConfig) -> None:
    """Exactly one of the model's folder and its server, and nothing that would be ignored."""
    url = config.server.url
    require(
        bool(config.path or url),
        f"{name}.path is empty and so is {name}.server.url; give a model folder or a Hub id, or a server's url",
    )
    require(
        not (config.path and url),
        f"{name}.path is {config.path!r} and {name}.server.url is {url!r}; give exactly one of them",
    )
    require(
        bool(url) or config.tokenizer is None,
        f"{name}.tokenizer is {config.tokenizer!r} but {name}.path is {config.path!r}, which has its own; unset it",
    )
    for setting in ("dtype", "attn_implementation", "liger"):
        value = getattr(config, setting)
        require(
            not url or value == getattr(ModelConfig, setting),
            f"{name}.{setting} is {value!r} but {name}.server.url is {url!r}: the server decides about that; unset it",
        )


def as_dict(config: RunConfig) -> dict[str, Any]:
    """A config as the plain dictionary that config.yaml holds."""
    return dataclasses.asdict(config)
