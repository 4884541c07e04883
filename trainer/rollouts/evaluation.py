"""Evaluation: sampled or greedy answers to held-out prompts, scored by a named function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    texts = [tokenizer.decode(trajectory.answer_ids, skip_special_tokens=True) for trajectory in answered]
    grader = eval_grader(config)
    answers = [Answer(p, text, grader(text, p.row)) for p, text in zip(prompts, texts, strict=True)]
    metrics = {
        "eval/accuracy": sum(answer.score for answer in answers) / len(answers),
        "eval/mean_length": sum(len(trajectory.token_ids) for trajectory in answered) / len(answered),
        "eval/truncated_fraction": sum(trajectory.truncated for trajectory in answered) / len(answered),
    }
    return metrics, answers
