"""What a function that writes the teacher's prompts sees of samples, and what it says of each."""

from __future__ import annotations

from typing import NamedTuple

from fastkl.trainer.teachers.context.turns import Content


class Attempt(NamedTuple):
    """What such a function sees of a sample."""

    text: str
    """All that follows the prompt, an environment's replies too, without special tokens."""
    reward: float | None
    """None: not graded."""
    truncated: bool
    """The completion reached the length limit."""
    feedback: str | None = None
    """What the environment said of it, for the teacher."""


class Told(NamedTuple):
    """What becomes of a sample."""

    content: Content | None
    """What its teacher reads before the completion; None: what the student read."""
    marks: frozenset[str] | None = None
    """What is counted of it, each as a share `context/…_fraction` of the samples whose marks are not None."""

    @property
    def masked(self) -> bool:
        """Whether the loss leaves it out."""
        return self.marks is not None and MASKED in self.marks


MASKED = "masked"
