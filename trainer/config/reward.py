"""Rewards beside the KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class RewardConfig:
    """A score of each whole sample, added to the advantages of its tokens (docs/rollouts.md).

    Args:
        grader: Scores a completion: last_number, boxed, math_verify, regex:PATTERN, reasoning_gym[:DATASET],
            function:MODULE.NAME, or environment (what the environment gave); null: no reward.
        coef: Weight of the reward in the advantage.
        baseline: What is taken off a reward: the mean of the samples of one prompt (group), or none.
        normalize: Divide by the group's standard deviation too.
        trust_grader: Import and run the Python function that `grader` names. Off unless you say so.
    """

    grader: str | None = None
    coef: float = 1.0
    baseline: Literal["group", "none"] = "group"
    normalize: bool = False
    trust_grader: bool = False

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.coef) and self.coef > 0,
            f"reward.coef is {self.coef}; it must be > 0 and finite; leave reward.grader null for no reward",
        )
        if self.grader is None:
            for name, value in vars(self).items():
                changed = value != getattr(RewardConfig, name)
                require(not changed, f"reward.{name} is {value!r} but reward.grader is null; name a grader")
        require(
            not self.normalize or self.baseline == "group",
            f"reward.normalize is true but reward.baseline is {self.baseline}; there is no group to normalise in",
        )
