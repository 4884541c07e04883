"""What a run is watched for while it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastkl.trainer.config.rules import at_least, fraction, positive

Action = Literal["off", "warn", "stop"]


@dataclass(frozen=True)
class GuardsConfig:
    """What a run is watched for. off: not at all. warn: say so, once. stop: end the run, with a checkpoint.

    Args:
        teacher_constant: Watch for a teacher that finds all tokens equally likely, or all far below chance.
        nothing_to_learn: Watch for a student that is sure of its tokens, and whose teacher agrees, in the first step.
        entropy_collapse: Watch for a student that loses its variety and gains nothing.
        length_growth: Watch for completions that grow until they are cut.
        repetition: Watch for completions that are cut while they repeat themselves.
        mismatch: Watch for a sampler that has other probabilities than the trainer.
        few_tokens: Watch for advantages that stand in 1 % of the tokens.
        rest: Watch for a teacher with its own tokenizer where the likely tokens of one side are not those of the other.
        accuracy_falling: Watch for an accuracy on eval.data that stays below its best.
        min_teacher_std: Call log-probs constant if their standard deviation is below this, in nats.
        min_teacher_kl: Call a first teacher_kl about 0 below this, in nats per token. null: 0.1 under policy_gradient, 0.02
            under objectives that compare distributions or lists.
        min_entropy: Call a student sure of its tokens below this, in nats per token.
        min_entropy_share: Call the entropy collapsed below this share of that of the first steps.
        max_truncated: Allow this share of cut completions, if there were at first fewer than a quarter of those.
        max_looping: Allow this share of completions that are cut while they repeat themselves.
        max_mismatch: Allow this KL between sampler and trainer, in nats per token. null: 0.002; 0.02 for a mixture of
            experts; 0.05 where sampling.dtype or mixed_precision rounds to bfloat16.
        max_missing: Allow the sampler this probability of tokens that it does not draw.
        max_slope: Allow the sampler's log-probs to differ from the trainer's by this share of themselves. null: 0.03; 0.06
            for a mixture of experts, and where rounding is allowed for in max_mismatch.
        max_top_share: Allow the 1 % of tokens with the largest advantages this share of the sum.
        max_rest: Allow student and teacher this probability of tokens that the other one's tokenizer does not have.
        evaluations: Wait for this many evaluations in a row below the best, each by more than chance.
    """

    teacher_constant: Action = "warn"
    nothing_to_learn: Action = "warn"
    entropy_collapse: Action = "warn"
    length_growth: Action = "warn"
    repetition: Action = "warn"
    mismatch: Action = "warn"
    few_tokens: Action = "warn"
    rest: Action = "warn"
    accuracy_falling: Action = "warn"
    min_teacher_std: float = 1e-3
    min_teacher_kl: float | None = None
    min_entropy: float = 0.04
    min_entropy_share: float = 0.1
    max_truncated: float = 0.5
    max_looping: float = 0.2
    max_mismatch: float | None = None
    max_missing: float = 0.005
    max_slope: float | None = None
    max_top_share: float = 0.9
    max_rest: float = 0.5
    evaluations: int = 3

    def __post_init__(self) -> None:
        at_least(0, self, "guards.", "min_teacher_std", "min_teacher_kl", "min_entropy")
        shares = "min_entropy_share", "max_truncated", "max_looping", "max_missing", "max_top_share", "max_rest"
        fraction(self, "guards.", *shares)
        positive(self, "guards.", "max_mismatch", "max_slope")
        at_least(1, self, "guards.", "evaluations")
