"""The teacher as the loop sees it: something that says how likely the student's tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastkl.trainer.data.samples import Sample

UNKNOWN = -50.0  # a log-prob for what the teacher cannot say: low enough to push it away, and finite


class TeacherError(RuntimeError):
    """The teacher cannot score now; what is wrong is in its surroundings, and the run can be resumed."""


class Teacher(Protocol):
    """A model here (`LocalTeacher`) or behind HTTP (`ServedTeacher`)."""

    def score(self, samples: Sequence[Sample]) -> None:
        """Writes the log-probs of all counted tokens into `teacher_logprobs`, at the temperature of the samples.

        An id that the teacher does not know gets UNKNOWN; what comes after it is scored as if it were PAD_ID.

        Raises:
            TeacherError: When it cannot, for now.
        """
        ...

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`flops/teacher`, what scoring these samples costs; nothing where that cannot be known."""
        ...
