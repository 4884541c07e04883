"""Evaluation: sampled or greedy answers to held-out prompts, scored by a named function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.data import EvalConfig
from fastkl.trainer.data.prompts import EncodedPrompt, encode_prompts
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.rollouts.grading.named import NamedGrader, named_grader
from fastkl.trainer.rollouts.single_turn import Responder
from fastkl.trainer.runs import processes


@dataclass(frozen=True)
class Answer:
    """One graded answer."""

    prompt: EncodedPrompt
    text: str
    score: float
    tokens: int  # how many were written
    truncated: bool


def load_eval_prompts(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
    """The held-out prompts, each with an answer; none if the config names no data."""
    grader = eval_grader(config)
    if config.data.path is None and config.data.dataset is None:
        return []
    prompts = encode_prompts(load_prompts(config.data), tokenizer, config.data)
    grader.check_rows(prompts, "evaluation")
    return prompts


def eval_grader(config: EvalConfig) -> NamedGrader:
    return named_grader("eval.grader", config.grader, trusted=config.trust_grader)


def evaluate(
    responder: Responder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EncodedPrompt],
    config: EvalConfig,
    seed: int,
) -> tuple[dict[str, float], list[Answer]]:
    """Metrics `eval/*` and the graded answers; several processes share the prompts, and all have all answers."""
    mine = responder.my_share(prompts)
    own = processes.raise_together(
        lambda: responder.respond(
            mine,
            max_new_tokens=[config.max_new_tokens] * len(mine),
            temperature=config.temperature,
            seed=processes.seed(seed),
        )
    )
    answered = processes.gather(own)
    grader = eval_grader(config)
    answers = []
    for prompt, trajectory in zip(prompts, answered, strict=True):
        text = tokenizer.decode(trajectory.answer_ids, skip_special_tokens=True)
        tokens = len(trajectory.token_ids)
        answers.append(Answer(prompt, text, grader(text, prompt.row), tokens, trajectory.truncated))
    return summary([vars(answer) for answer in answers]), answers


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics `eval/*` of graded answers, of which each has `score`, `tokens` and `truncated`."""
    count = len(answers)
    return {
        "eval/accuracy": sum(answer["score"] for answer in answers) / count,
        "eval/mean_length": sum(answer["tokens"] for answer in answers) / count,
        "eval/truncated_fraction": sum(answer["truncated"] for answer in answers) / count,
    }
