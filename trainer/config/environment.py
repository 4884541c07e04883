"""Multi-turn rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from fastkl.trainer.errors import require


@dataclass(frozen=True)
class EnvironmentConfig:
    """What answers the student between its turns; its tokens are context and carry no loss (docs/rollouts.md).

    Args:
        name: calculator, or class:MODULE.NAME (an `Environment` of your own); null: one turn, no environment.
        role: Role of its messages in the chat template, for example user or tool; null: its text goes on inside the
            student's own message.
        max_turns: Turns of the student, at most.
        trust: Import and run the Python class that `name` names. Off unless you say so.
    """

    name: str | None = None
    role: str | None = None
    max_turns: int = 8
    trust: bool = False

    def __post_init__(self) -> None:
        require(self.max_turns >= 1, f"environment.max_turns is {self.max_turns}; it must be at least 1")
        if self.name is None:
            for name, value in vars(self).items():
                changed = value != getattr(EnvironmentConfig, name)
                require(
                    not changed, f"environment.{name} is {value!r} but environment.name is null; name an environment"
                )
            return
        require(
            self.trust == self.name.startswith("class:") or not self.trust,
            f"environment.trust is true but environment.name is {self.name!r}, which is no class of yours; unset it",
        )
