"""Rewards beside the KL, and environments, which may pay them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.errors import require


@dataclass(frozen=True)
class RewardConfig:
    """A score of each whole sample, added to the advantages of its tokens (docs/data/rollouts.md).

    Args:
        grader: Score completions with this: last_number, boxed, math_verify, regex:PATTERN, reasoning_gym[:DATASET],
            function:MODULE.NAME, or environment (the environment's own reward). null: no reward.
        coef: Weigh the reward in the advantage by this. 0: samples are graded, and what reads the grades is
            teacher.context.function.
        baseline: Subtract from a reward the mean of the samples of its prompt (group), or nothing (none).
        normalize: Divide by the standard deviation of the group as well.
        trust_grader: Allow the Python function that `grader` names to be imported and run.
    """

    grader: str | None = None
    coef: float = 1.0
    baseline: Literal["group", "none"] = "group"
    normalize: bool = False
    trust_grader: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, "reward.", "coef")
        if self.grader is None:
            unchanged(self, "reward.", "reward.grader is null; name a grader")
        if self.coef == 0:
            reason = "reward.coef is 0, which leaves the reward out of the advantages; unset one of them"
            unchanged(self, "reward.", reason, ["baseline", "normalize"])
        require(
            not self.normalize or self.baseline == "group",
            f"reward.normalize is true, but reward.baseline is {self.baseline}: there is no group; unset one of them",
        )

    @property
    def pays(self) -> bool:
        """Whether the student learns from the reward itself."""
        return self.grader is not None and self.coef > 0


@dataclass(frozen=True)
class EnvironmentConfig:
    """What answers the student between its turns. Its tokens are context and carry no loss (docs/data/rollouts.md).

    Args:
        name: Use this environment: calculator, or class:MODULE.NAME (your own `Environment`). null: one turn only.
        role: Give its messages this role in the chat template, for example user or tool. null: its text is written into
            the student's own message.
        max_turns: Limit the number of turns of the student.
        trust: Allow the Python class that `name` names to be imported and run.
    """

    name: str | None = None
    role: str | None = None
    max_turns: int = 8
    trust: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, "environment.", "max_turns")
        if self.name is None:
            unchanged(self, "environment.", "environment.name is null; name an environment")
        else:
            require(
                not self.trust or self.name.startswith("class:"),
                f"environment.trust is true, but environment.name is {self.name!r}, which is no class of yours; unset it",
            )
