"""The turns of a completion: what the student wrote, and what an environment replied in turns of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.rollouts.turn_markers import turn_markers
from fastkl.trainer.teachers.alignment.ends import End
from fastkl.trainer.teachers.alignment.segments import NOWHERE, Segments


class Begins(NamedTuple):
    """White space of templates in the first tokens of a text, which is no part of it."""

    ours: int = 0  # bytes
    theirs: str = ""


class Turn(NamedTuple):
    """One of the student's, after a reply, if there was one."""

    reply: tuple[int, list[int]]  # how many tokens the student read, and those that the teacher reads
    text: Array  # the student's, without its end
    end: End
    before: tuple[int, int]  # the tokens that stand before the text, for both
    begins: Begins = Begins()


class Replies:
    """Encodes an environment's replies for a teacher, as its template writes turns of a role.

    Args:
        ours: The student's tokenizer.
        theirs: The teacher's.
        chat: What wrote the student's prompt.
        template: The teacher's template.
        role: That of the replies.

    Raises:
        ConfigError: For a template that cannot carry a conversation on.
    """

    def __init__(
        self,
        ours: PreTrainedTokenizerBase,
        theirs: PreTrainedTokenizerBase,
        chat: ChatTemplate,
        template: ChatTemplate,
        role: str,
    ) -> None:
        self._ours = turn_markers(ours, role, chat.variables)
        try:
            self._theirs = turn_markers(theirs, role, template.variables)
        except ConfigError as error:
            raise ConfigError(f"of the teacher: {error}") from error
        self._tokenizer = theirs
        self.alike = self._ours == self._theirs

    def ids(self, written: str, ended: str, end: Sequence[int]) -> list[int]:
        """The teacher's tokens of what stands between two of the student's turns.

        Args:
            written: What the student read there.
            ended: The token that the student ended its turn with; "" where it was stopped.
            end: What stands for that with the teacher.
        """
        before, after = self._ours
        first = before.partition(ended)[2] if ended and ended in before else before
        text = written.removeprefix(first).removesuffix(after)
        return self._theirs.ids(text, self._tokenizer, end[-1] if end else -1, set(end))


def runs(ids: Array, counted: Array) -> Iterator[tuple[Array, bool]]:
    """The stretches of a completion that the student wrote, and the others, in order."""
    borders = np.flatnonzero(np.diff(counted)) + 1
    for part, own in zip(np.split(ids, borders), np.split(counted, borders), strict=True):
        if len(part):
            yield part, bool(own[0])


def unaligned(ours: int, theirs: int) -> Segments:
    """Of tokens that are in no segment."""
    return Segments(np.full(ours, NOWHERE, np.int32), np.full(theirs, NOWHERE, np.int32), np.empty(0, np.int32))


def joined(parts: Sequence[Segments]) -> Segments:
    """Those of parts that stand one after the other."""
    before = np.cumsum([0, *(part.count for part in parts)])
    student_of, teacher_of = (
        np.concatenate(
            [np.where(own >= 0, own + first, NOWHERE) for own, first in zip(places, before[:-1], strict=True)]
        )
        for places in ([part.student_of for part in parts], [part.teacher_of for part in parts])
    )
    lengths = np.concatenate([part.lengths for part in parts])
    return Segments(student_of.astype(np.int32), teacher_of.astype(np.int32), lengths)
