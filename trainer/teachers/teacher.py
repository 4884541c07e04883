"""The teacher as the loop sees it: something that says how likely the student's tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from fastkl.trainer.data.samples import Sample


class Lists(NamedTuple):
    """The lists of tokens that an objective asks teachers for, at each place."""

    teacher: int | None = None  # so many of the teacher's likeliest tokens
    student: int | None = None  # log-probs of so many ids that the student chose: `Sample.student_top_k`
    setting: str = "loss.top_k"  # which says how many
    with_token: bool = False  # the log-prob of the token itself is normalised over the ids that lists have


class Teacher(Protocol):
    """A model here (`LocalTeacher`) or behind HTTP (`ServedTeacher`)."""

    vocab_size: int | None  # the student's distributions are cut to so many ids when compared; None: they are not

    def score(self, samples: Sequence[Sample]) -> None:
        """Writes the log-probs of all counted tokens into `teacher_logprobs`, at the temperature of the samples.

        Where the objective asks for lists, they go into `teacher_top_k`: its likeliest tokens, then the ids of
        `student_top_k`.
        An id that the teacher does not know gets UNKNOWN; what comes after it is scored as if it were PAD_ID.

        Raises:
            ServerError: When its server cannot, for now.
        """
        ...

    def rank(self, samples: Sequence[Sample], vocab_size: int) -> None:
        """Writes `teacher_ranks` of all counted tokens, among the ids below `vocab_size`: see `batch_ranks`.

        A server has said them when it scored the samples, or not at all.
        """
        ...

    def score_plain(self, samples: Sequence[Sample]) -> None:
        """Writes `plain_logprobs` of all counted tokens, after what the student read, whatever prompt the teacher has.

        A server is not asked again.
        """
        ...

    def recheck(self) -> None:
        """Sees once more, after the last step was scored, that all scores are of the teacher that the run began with.

        Raises:
            ServerError: If its server has changed. A model here cannot.
        """
        ...

    def flops(self, samples: Sequence[Sample]) -> dict[str, float]:
        """`flops/teacher`, what scoring these samples costs; nothing where that cannot be known."""
        ...
