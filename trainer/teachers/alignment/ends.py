"""What stands for the end of the student's turn in the teacher's tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.teachers.alignment.segments import Segments

_START = "1"  # nothing joins it


class TurnEnd(NamedTuple):
    """How a tokenizer ends what it answers: in a chat as the template does, else by its end of sequence."""

    closing: str  # text before the token
    token: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None) -> TurnEnd | None:
        """None where neither the template nor the tokenizer has an end."""
        end = "" if chat is None else chat.end_token
        if chat is not None and end:
            found: int = tokenizer.convert_tokens_to_ids(end)
            return cls(chat.after_answer[0].removesuffix(end), found)
        return None if tokenizer.eos_token_id is None else cls("", tokenizer.eos_token_id)


def ids_inside(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of what a template writes inside of a chat, without a space that the tokenizer would put at the beginning."""
    start, whole = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (_START, _START + text))
    if whole[: len(start)] == start:
        return list(whole[len(start) :])
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class End(NamedTuple):
    """Of one completion."""

    ours: int  # how many of its last tokens it is; 0: it has no end
    theirs: list[int]  # the teacher's tokens


def with_end(text: Segments, end: End) -> Segments:
    """The segments of a text and of its end, which is one more: it is no text, and has no bytes."""
    if not end.ours:
        return text
    student_of, teacher_of = (
        np.append(places, np.full(size, text.count, np.int32))
        for places, size in ((text.student_of, end.ours), (text.teacher_of, len(end.theirs)))
    )
    return Segments(student_of, teacher_of, np.append(text.lengths, np.int32(0)))


class EndPairs:
    """Pairs the ends of completions.

    The end of the student's turn goes with the end of the teacher's. Another end goes with the teacher's token of the same
    name, if it has one, and else with the end of its turn too.

    Args:
        ours: The student's tokenizer.
        theirs: The teacher's.
        chat: What wrote the student's prompt; None: it is a text.
        template: What writes the teacher's chats.

    Raises:
        ConfigError: Where the teacher's tokenizer has no end.
    """

    def __init__(
        self,
        ours: PreTrainedTokenizerBase,
        theirs: PreTrainedTokenizerBase,
        chat: ChatTemplate | None,
        template: ChatTemplate | None,
    ) -> None:
        self._ours, self._end = ours, TurnEnd.of(ours, chat)
        their_end = TurnEnd.of(theirs, None if chat is None else template)
        if their_end is None:
            raise ConfigError(
                "the teacher's tokenizer declares no end of sequence, and nothing would stand for the end of the student's "
                "turn; set its eos_token"
            )
        self._theirs = [*ids_inside(theirs, their_end.closing), their_end.token]
        self._named = {str(added): token for token, added in theirs.added_tokens_decoder.items()}

    @property
    def closing(self) -> bytes:
        """What the student writes before the token that ends its turn, and which is no part of the answer."""
        return b"" if self._end is None else self._end.closing.encode()

    @property
    def pair(self) -> tuple[int, int] | None:
        """The tokens that end the turns of both; None where one of them writes more than a token."""
        if self._end is None or self._end.closing or len(self._theirs) > 1:
            return None
        return self._end.token, self._theirs[0]

    def of(self, token: int) -> list[int]:
        """The teacher's tokens for one that ends the student's completion."""
        if self._end is None or token != self._end.token:
            named = self._named.get(str(self._ours.convert_ids_to_tokens(token)))
            if named is not None:
                return [named]
        return self._theirs
