"""Environments: what answers the student between its turns. A pure function of the conversation so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastkl.trainer.config.reward import EnvironmentConfig
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.calculator import calculate
from fastkl.trainer.rollouts.grading.trusted import imported


class Message(NamedTuple):
    role: str
    content: str


class Reply(NamedTuple):
    """What the environment says to the student, or, without a text, that the conversation is over."""

    text: str | None = None
    reward: float = 0.0
    """Added up over the conversation: the score of the sample where reward.grader is `environment`."""
    feedback: str | None = None
    """For the teacher (`teacher.context.function`), also with the last reply. The student never reads it."""


class Environment(Protocol):
    """Answers at the end of each turn of the student."""

    @property
    def stops(self) -> Sequence[str]:
        """Texts that end a turn, beside the end of sequence; the token that completes one is the turn's last."""
        ...

    @property
    def rewards(self) -> bool:
        """Whether its replies carry rewards."""
        ...

    def reply(self, conversation: Sequence[Message], row: Prompt) -> Reply:
        """The same for the same arguments, always. The conversation begins with the prompt and ends with the student."""
        ...


class Calculator:
    """Answers `<calc>12*7</calc>` with ` = 84`, and what is no arithmetic with ` = error`; says nothing else."""

    stops = ("</calc>",)
    rewards = False

    def reply(self, conversation: Sequence[Message], row: Prompt) -> Reply:
        _, opened, expression = conversation[-1].content.rstrip().rpartition("<calc>")
        if not opened or not expression.endswith("</calc>"):
            return Reply()
        return Reply(f" = {calculate(expression.removesuffix('</calc>'))}")


ENVIRONMENTS = {"calculator": Calculator}


def make_environment(config: EnvironmentConfig) -> Environment | None:
    """The environment that a config names; None where it names none."""
    if config.name is None:
        return None
    if ":" in config.name:
        environment: Environment = imported(
            "environment.name", config.name.partition(":")[2], "environment.trust", config.trust
        )()
        return environment
    if config.name not in ENVIRONMENTS:
        raise ConfigError(
            f"environment.name is {config.name!r}; known are {', '.join(sorted(ENVIRONMENTS))} and class:MODULE.NAME"
        )
    return ENVIRONMENTS[config.name]()
