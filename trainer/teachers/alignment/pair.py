"""The tokenizers of a student and a teacher."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import Array
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT, are_one
from fastkl.trainer.teachers.alignment.common import CommonVocabulary, common_vocabulary, identical, one_to_one
from fastkl.trainer.teachers.alignment.completion import Aligned, Translator
from fastkl.trainer.teachers.alignment.segments import Segments
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes
from fastkl.trainer.teachers.alignment.turns import Turn
from fastkl.trainer.teachers.alignment.unsettled import Unsettled


class TokenizerPair:
    """Both, and the way from one to the other. To be used by one thread at a time: `lock`.

    Raises:
        ConfigError: For a tokenizer whose tokens are no known bytes.

    Attributes:
        looks_ahead: Whether what follows a token may decide if the other has a boundary at its end. With the same tokens,
            under whichever ids, and the same splits it does not, as long as the student writes what its tokenizer would.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self.teacher = teacher
        # Others than those that read prompts: no tokenizer may be in two threads at a time.
        ours, theirs = copy.deepcopy(student), copy.deepcopy(teacher)
        self.lock = threading.Lock()
        self.ours, self.theirs = TokenBytes(ours, "student"), TokenBytes(theirs, "teacher")
        self.one = are_one(ours, theirs)
        self.looks_ahead = not self.one and not self._split_alike()
        self._unsettled = Unsettled(self.theirs.all - {self.theirs[token] for token in self.theirs.special})
        self._translator = Translator(self.ours, self.theirs)
        self._common: dict[tuple[tuple[int, int], ...], CommonVocabulary] = {}

    def aligned(self, turns: Sequence[Turn]) -> list[Aligned]:
        """The texts of turns in the teacher's tokens; of one tokenizer, in those that were written."""
        if not self.one:
            texts = [turn.text.tolist() for turn in turns]
            ours, theirs = zip(*(turn.before for turn in turns), strict=True) if turns else ((), ())
            return self._translator.aligned(texts, ours, theirs, [turn.begins for turn in turns])
        places = [np.arange(len(turn.text), dtype=np.int32) for turn in turns]
        return [
            Aligned(turn.text, Segments(own, own, self.ours.lengths(turn.text)))
            for turn, own in zip(turns, places, strict=True)
        ]

    def answers_back(self, turn: Turn) -> Array:
        """How many tokens before each of a turn's text and end decide with it where their segments end, int32 [n]."""
        size = len(turn.text) + turn.end.ours
        if not self.looks_ahead:
            return np.zeros(size, np.int32)
        text, lengths = self.ours.written(turn.text.tolist(), turn.before[0])
        back = self._unsettled.back(text, np.append(lengths, np.int32(0)))
        after = np.arange(turn.end.ours, dtype=np.int32)  # all of an end follow the text
        return np.append(back[:-1], back[-1] + after) if turn.end.ours else back[:-1]

    def common(self, ends: Iterable[tuple[int, int]]) -> CommonVocabulary:
        """The tokens that both have; `ends`: of either, which end a turn."""
        special = () if self.one else tuple(one_to_one([*ends, *self._translator.kept.items()]).items())
        if special not in self._common:
            made = identical(self.ours) if self.one else common_vocabulary(self.ours, self.theirs, dict(special))
            self._common[special] = made
        return self._common[special]

    def _split_alike(self) -> bool:
        """Whether both have the same tokens, and split a text alike that is hard to split."""
        tokens = [[own[token] for token in own.encode([SAMPLE_TEXT], [None])[0]] for own in (self.ours, self.theirs)]
        return self.ours.all == self.theirs.all and tokens[0] == tokens[1]
