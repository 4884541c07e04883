"""Multi-turn rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from fastkl.trainer.config.rules import at_least, unchanged
from fastkl.trainer.errors import require


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
