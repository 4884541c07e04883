"""Judging a finished trajectory: by a grader, on the text of the student's last message, or by the environment."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from fastkl.trainer.config.reward import RewardConfig
from fastkl.trainer.data.prompts import EncodedPrompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.environments import Environment
from fastkl.trainer.rollouts.grading.named import NamedGrader, named_grader
from fastkl.trainer.rollouts.rollout import Judge
from fastkl.trainer.rollouts.single_turn import Trajectory


def make_judge(
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    environment: Environment | None,
    prompts: Sequence[EncodedPrompt],
) -> Judge | None:
    """What `reward.grader` names, once all rows have what it needs; None for no reward."""
    if config.grader is None:
        return None
    if config.grader == "environment":
        if environment is None or not environment.rewards:
            raise ConfigError(
                "reward.grader is environment, but this environment gives no rewards; name another grader"
            )
        return lambda trajectory, prompt: trajectory.reward or 0.0
    grader = named_grader("reward.grader", config.grader, trusted=config.trust_grader)
    grader.check_rows(prompts, "reward.grader")
    return by_text(grader, tokenizer)


def by_text(grader: NamedGrader, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """Grades the text of the last message."""

    def judge(trajectory: Trajectory, prompt: EncodedPrompt) -> float:
        return grader(tokenizer.decode(trajectory.answer_ids, skip_special_tokens=True), prompt.row)

    return judge
