"""Evaluation: sampled or greedy answers to held-out prompts, scored by a named function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fastkl.trainer import processes
from fastkl.trainer.config.data import EvalConfig
from fastkl.trainer.config.errors import ConfigError
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts, load_prompts
from fastkl.trainer.grading.graders import GRADERS
from fastkl.trainer.samplers.sampler import Sampler


@dataclass(frozen=True)
class Answer:
    """One graded answer."""

    prompt: EncodedPrompt
    text: str
    score: float


def load_eval_prompts(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """The held-out prompts, each with an answer; none if the config names no data."""
    if config.grader not in GRADERS:
        raise ConfigError(f"eval.grader is {config.grader!r}; known are {', '.join(sorted(GRADERS))}")
    if config.data.path is None and config.data.dataset is None:
        return []
    prompts = encode_prompts(load_prompts(config.data), tokenizer, config.data)
    for prompt in prompts:
        if prompt.row.answer is None:
            raise ConfigError(f"{prompt.row.source}: no `answer`; evaluation needs one in each row")
    return prompts


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    config: EvalConfig,
    seed: int,
) -> tuple[dict[str, float], list[Answer]]:
    """Metrics `eval/*` and the graded answers; several processes share the prompts, and all have all answers."""
    own = processes.agree(
        lambda: sampler.sample(
            [prompt.ids for prompt in processes.share(prompts)],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=processes.seed(seed),
        )
    )
    completions = processes.gather(own)
    texts = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    grade = GRADERS[config.grader]
    answers = [Answer(p, text, grade(text, p.row.answer or "")) for p, text in zip(prompts, texts, strict=True)]
    metrics = {
        "eval/accuracy": sum(answer.score for answer in answers) / len(answers),
        "eval/mean_length": sum(len(c.token_ids) for c in completions) / len(completions),
        "eval/truncated_fraction": sum(c.truncated for c in completions) / len(completions),
    }
    return metrics, answers
