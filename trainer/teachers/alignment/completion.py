"""A completion as its teacher reads it: the same text, in the teacher's own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.teachers.alignment.equal_stretches import equal_stretches
from fastkl.trainer.teachers.alignment.segments import NOWHERE, Segments, align
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes
from fastkl.trainer.teachers.alignment.turns import Begins


class Aligned(NamedTuple):
    """One completion in the tokens of both."""

    teacher_ids: Array  # int32 [m]
    segments: Segments  # of the student's ids and of these


class Translator:
    """From the tokens of a student to those of its teacher, by the bytes that they write.

    A token that is special to one of them stays one token, where the other has an added one with the same text. All else
    is text to the teacher: a special token that the student spells out is no special token of the teacher.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes) -> None:
        self._student, self._teacher = student, teacher
        theirs = {teacher[token]: token for token in teacher.added}
        self.kept = {  # the teacher's ids of tokens that stay one token
            token: theirs[student[token]]
            for token in student.added
            if student[token] in theirs and (token in student.special or theirs[student[token]] in teacher.special)
        }

    def aligned(
        self,
        completions: Sequence[Sequence[int]],
        after_student: Sequence[int | None],
        after_teacher: Sequence[int | None],
        begins: Sequence[Begins] | None = None,
    ) -> list[Aligned]:
        """Of completions in the student's ids, each without its end, and without what templates write before it (`begins`).

        `after_student` and `after_teacher` are the ids that stand before each, the last of either's prompt; None where
        there are none: some tokenizers put a space between a special token and a text, which is no part of the text.

        What the two do not read alike is in no segment: bytes that are no UTF-8 (the teacher reads U+FFFD there), what a
        normaliser changes, and ids of the student that are no tokens.
        """
        begins = [Begins()] * len(completions) if begins is None else begins
        parts = [list(self._parts(*each)) for each in zip(completions, after_student, begins, strict=True)]
        texts: list[str] = []
        befores: list[int | None] = []
        for own, last in zip(parts, after_teacher, strict=True):
            for part in own:
                if isinstance(part, str):
                    texts.append(part)
                    befores.append(last)
                else:
                    last = part
        encoded = iter(self._teacher.encode(texts, befores))
        found = [[token for part in own for token in _tokens(part, encoded)] for own in parts]
        rows = zip(completions, found, after_student, after_teacher, begins, strict=True)
        return [self._align(*row) for row in rows]

    def _parts(self, ids: Sequence[int], before: int | None, begins: Begins) -> Iterator[str | int]:
        """Texts, and between them the teacher's ids of tokens that stay tokens. The first begins as the teacher's do."""
        start = 0
        for place in [*(place for place, token in enumerate(ids) if token in self.kept), len(ids)]:
            if place > start:
                written, _ = self._student.written(ids[start:place], ids[start - 1] if start else before)
                if written:
                    text = written[0 if start else begins.ours :].decode(errors="replace")
                    yield text if start else begins.theirs + text
            if place < len(ids):
                yield self.kept[ids[place]]
            start = place + 1

    def _align(
        self,
        ours: Sequence[int],
        theirs: Sequence[int],
        after_student: int | None,
        after_teacher: int | None,
        begins: Begins,
    ) -> Aligned:
        written, lengths = _after(begins.ours, *self._student.written(ours, after_student))
        others, their_lengths = self._teacher.written(theirs, after_teacher)
        space = begins.theirs.encode()
        others, their_lengths = _after(len(space) if others.startswith(space) else 0, others, their_lengths)
        segments = align(lengths, their_lengths, equal_stretches(written, others))
        known = self._student.lengths(ours) > 0
        if not known.all():
            segments = replace(segments, student_of=np.where(known, segments.student_of, NOWHERE).astype(np.int32))
        return Aligned(np.asarray(theirs, np.int32), segments)


def _after(size: int, written: bytes, lengths: Array) -> tuple[bytes, Array]:
    """What tokens write after so many bytes, and with how many of its own each."""
    ends = np.maximum(np.cumsum(lengths) - size, 0)
    return written[size:], np.diff(ends, prepend=0).astype(np.int32)


def _tokens(part: str | int, encoded: Iterator[list[int]]) -> list[int]:
    return next(encoded) if isinstance(part, str) else [part]
