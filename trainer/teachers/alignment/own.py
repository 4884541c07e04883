"""Samples as a teacher with its own tokenizer reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastkl.trainer.data.arrays import Array, after_zeros
from fastkl.trainer.data.chat import ChatTemplate
from fastkl.trainer.data.mixture import DataSet
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.errors import require
from fastkl.trainer.teachers.alignment.beginnings import Beginnings
from fastkl.trainer.teachers.alignment.common import CommonVocabulary
from fastkl.trainer.teachers.alignment.completion import Aligned
from fastkl.trainer.teachers.alignment.counts import Counts, counts_of, sizes, sum_counts
from fastkl.trainer.teachers.alignment.ends import End, EndPairs, ids_inside, with_end
from fastkl.trainer.teachers.alignment.pair import TokenizerPair
from fastkl.trainer.teachers.alignment.reader import Reader
from fastkl.trainer.teachers.alignment.segments import Segments
from fastkl.trainer.teachers.alignment.shown import line
from fastkl.trainer.teachers.alignment.turns import Begins, Replies, Turn, joined, runs, unaligned


class OwnTokenizer:
    """Encodes what the student wrote for the teacher of a data set.

    Args:
        data_set: As the student reads it.
        pair: Both tokenizers.
        max_segment: Longer segments, in bytes, are none, unless they are one token of both.
        role: That of an environment's replies, where they are turns of their own.
        setting: What messages call the teacher's settings.
        distributions: Whole distributions are compared where a token begins: an end of several tokens has none.

    Raises:
        ConfigError: For a teacher's tokenizer that has no end, or no template where there are chats.
    """

    def __init__(
        self,
        data_set: DataSet,
        pair: TokenizerPair,
        max_segment: int,
        role: str | None,
        setting: str,
        distributions: bool = False,
    ) -> None:
        chats = {*data_set.prompts.chats}
        template = _template(pair.teacher, chats, data_set, setting)
        self.reader = Reader(pair.teacher, own=True, template=template)
        self._pair, self._max_segment, self._distributions = pair, max_segment, distributions
        ours, theirs = pair.ours.tokenizer, pair.theirs.tokenizer
        self._ends = {chat: EndPairs(ours, theirs, chat, template) for chat in chats}
        self._beginnings = {chat: Beginnings.of(chat, template) for chat in chats}
        self._replies: dict[ChatTemplate | None, Replies] = {}
        for chat in chats:
            if chat is not None and template is not None and role is not None:
                self._replies[chat] = Replies(ours, theirs, chat, template, role)
        self._end_ids = {ours.convert_tokens_to_ids(end) for chat in chats for end in (chat or ChatTemplate(ours)).ends}

    def also_end(self, tokens: Iterable[int]) -> None:
        """These tokens end the student's completions too."""
        self._end_ids |= {*tokens}

    def common(self) -> CommonVocabulary:
        """The tokens of both. The end of the student's turn and that of the teacher's are one."""
        chats = sorted(self._ends, key=lambda chat: chat is None)
        return self._pair.common([pair for chat in chats if (pair := self._ends[chat].pair) is not None])

    def encode(self, samples: Sequence[Sample], chats: Sequence[ChatTemplate | None], limit: float) -> Counts:
        """Writes completions as the teacher reads them after `teacher_prompt`, and the segments of both.

        `chats` wrote the student's prompts. Of more than `limit` tokens with the prompt, the rest is left out.
        """
        with self._pair.lock:
            turns = [self._turns(sample, chat) for sample, chat in zip(samples, chats, strict=True)]
            texts = iter(self._pair.aligned([turn for own in turns for turn in own]))
        pairs = zip(samples, turns, strict=True)
        return sum_counts([self._write(sample, [(turn, next(texts)) for turn in own], limit) for sample, own in pairs])

    def lines(self, sample: Sample) -> tuple[str, str]:
        """What the student wrote and what the teacher reads of it, with marks between tokens and segments."""
        start, theirs = sample.prompt_length, sample.teacher_completion
        assert theirs is not None  # `encode` has written it
        return (
            line(sample.ids[start:].tolist(), sample.segments[start:], self._pair.ours),
            line(theirs.tolist(), sample.teacher_segments, self._pair.theirs),
        )

    def _turns(self, sample: Sample, chat: ChatTemplate | None) -> list[Turn]:
        """The student's turns, with the replies before them; one turn where replies are no turns of their own."""
        assert sample.teacher_prompt is not None
        start, replies, ends = sample.prompt_length, self._replies.get(chat), self._ends[chat]
        ids, counted = sample.ids[start:], sample.loss_mask[start:]
        one = replies is None or (self._pair.one and replies.alike)
        before = int(sample.ids[start - 1]), int(sample.teacher_prompt[-1])
        turns, reply, ended, end = list[Turn](), (0, list[int]()), "", End(0, [])
        for part, own in [(ids, True)] if one else runs(ids, counted):
            if own:
                end = self._end(part, ends)
                ended = self._pair.ours[int(part[-1])].decode() if end.ours else ""
                turns.append(self._begun(Turn(reply, part[: len(part) - end.ours], end, before), chat))
                reply = 0, []
            elif replies is not None:
                written = self._pair.ours.join(part.tolist()).decode(errors="replace")
                reply = len(part), replies.ids(written, ended, end.theirs)
                before = int(part[-1]), reply[1][-1]
        return turns if turns and not reply[0] else [*turns, Turn(reply, ids[:0], End(0, []), before)]

    def _begun(self, turn: Turn, chat: ChatTemplate | None) -> Turn:
        """Without what the student's template writes before an answer, and after what the teacher's does."""
        begin, ours = self._beginnings[chat], self._pair.ours
        if self._pair.one or not any(begin):
            return turn
        text, lengths = ours.written(turn.text.tolist(), turn.before[0])
        dropped = begin.dropped(text)
        ends = np.cumsum(lengths)
        whole = int(np.searchsorted(ends, dropped, side="right")) if dropped else 0
        words, space = begin.added(text[dropped:])
        read = ids_inside(self._pair.theirs.tokenizer, words) if words else []
        last = int(turn.text[whole - 1]) if whole else turn.before[0]
        return Turn(
            (turn.reply[0] + whole, [*turn.reply[1], *read]),
            turn.text[whole:],
            turn.end,
            (last, read[-1] if read else turn.before[1]),
            Begins(dropped - int(ends[whole - 1]) if whole else dropped, space),
        )

    def _end(self, ids: Array, ends: EndPairs) -> End:
        """What ends a turn, and what stands for it."""
        if not len(ids) or int(ids[-1]) not in self._end_ids:
            return End(0, [])
        return End(1 + self._closing(ids[:-1], ends.closing), ends.of(int(ids[-1])))

    def _closing(self, ids: Array, closing: bytes) -> int:
        """How many of the last tokens write the `closing` of a turn; 0 where they do not, or more than that."""
        written, count = b"", 0
        while len(written) < len(closing) and count < len(ids):
            count += 1
            written = self._pair.ours[int(ids[-count])] + written
        return count if written == closing else 0

    def _write(self, sample: Sample, turns: Sequence[tuple[Turn, Aligned]], limit: float) -> Counts:
        assert sample.teacher_prompt is not None
        parts, read, back = list[Segments](), list[Array](), list[Array]()
        for turn, text in turns:
            parts += [unaligned(turn.reply[0], len(turn.reply[1])), with_end(text.segments, turn.end)]
            back += [np.zeros(turn.reply[0], np.int32), self._pair.answers_back(turn)]
            read += [np.array(turn.reply[1], np.int32), text.teacher_ids, np.array(turn.end.theirs, np.int32)]
        found, theirs = joined(parts), np.concatenate(read)
        room = max(0, int(min(limit - len(sample.teacher_prompt), len(theirs))))
        counted = sample.loss_mask[sample.prompt_length :]
        found = found.without(self._dropped(found, counted, room))
        sample.answers_back = after_zeros(sample.prompt_length, np.concatenate(back))
        sample.teacher_completion = theirs[:room]
        sample.teacher_segments = 1 + found.teacher_of[:room]
        sample.segments = after_zeros(sample.prompt_length, 1 + found.student_of)
        return counts_of(found, counted)

    def _dropped(self, found: Segments, counted: Array, room: int) -> Array:
        """Which segments are none: too long, partly the student's, in pieces, or beyond the teacher's room."""
        ours, theirs = sizes(found.student_of, found), sizes(found.teacher_of, found)
        own = sizes(found.student_of[counted], found)
        pairs = (ours == 1) & (theirs == 1)
        long = (found.lengths > self._max_segment) | (self._distributions & (found.lengths == 0))
        dropped = (long & ~pairs) | ((own > 0) & (own < ours))
        for places in (found.student_of, found.teacher_of):
            begins = np.append(True, places[1:] != places[:-1])[: len(places)]
            dropped |= sizes(places[begins], found) > 1
        return dropped | (sizes(found.teacher_of[room:], found) > 0)


def _template(
    theirs: PreTrainedTokenizerBase, chats: set[ChatTemplate | None], data_set: DataSet, setting: str
) -> ChatTemplate | None:
    """The teacher's own, where prompts are chats."""
    student = next((chat for chat in chats if chat is not None), None)
    if student is None:
        require(
            not data_set.context.template_kwargs,
            f"{setting}.context.template_kwargs is {data_set.context.template_kwargs}, but {data_set.setting} holds no "
            f"chats; unset it",
        )
        return None
    require(
        theirs.chat_template is not None,
        f"the teacher's tokenizer ({data_set.teacher.tokenizer_path}) has no chat template, and {data_set.setting} holds "
        f"chats; give it one, or render the chats into text prompts and set data.chat_template to false",
    )
    own = data_set.context.template_kwargs
    ChatTemplate(theirs, own).check_variables(f"{setting}.context.template_kwargs")
    return ChatTemplate(theirs, {**student.variables, **own})
