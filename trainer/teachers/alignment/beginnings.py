"""What templates write before an answer: a space, a tag, an empty thought. It is no part of the answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.replies import opened_thought

_FIRST = re.compile(r"\s*(<[^<>]*>|\S+)")  # how a beginning is known again


class Beginnings(NamedTuple):
    """Of a student's answers, and of its teacher's."""

    ours: str = ""
    theirs: str = ""

    @classmethod
    def of(cls, student: ChatTemplate | None, teacher: ChatTemplate | None) -> Beginnings:
        """Nothing where both write the same, or where the answer begins inside of a thought that the prompt has opened.

        Nor where the student may open a thought itself, which the teacher's prompt has opened.
        """
        if student is None or teacher is None or opened_thought(student.opening) is not None:
            return cls()
        found = cls(student.before_answer, teacher.before_answer)
        if found.ours == found.theirs or (opened_thought(teacher.opening) is not None and _FIRST.match(found.ours)):
            return cls()
        return found

    def dropped(self, answer: bytes) -> int:
        """With how many bytes the student begins as its own template does."""
        ours = self.ours.encode()
        return len(ours) if answer.startswith(ours) else 0

    def added(self, answer: bytes) -> tuple[str, str]:
        """What the teacher reads before this answer, which has lost its own: tokens and words, and the white space after.

        Nothing where the answer begins so by itself.
        """
        begins = _FIRST.match(self.theirs)
        text = answer.decode(errors="replace")
        same = text.lstrip().startswith(begins[1]) if begins else text.startswith(self.theirs)
        if not text or same:
            return "", ""
        words = self.theirs.rstrip()
        return words, self.theirs[len(words) :]
