"""The tokens that two tokenizers have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from fastkl.loss import TopK
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes


class CommonVocabulary:
    """Pairs of ids of a student and a teacher. An id is in one pair at most.

    Attributes:
        student_ids: int64 [C].
        teacher_ids: int64 [C], the same tokens.
    """

    def __init__(self, pairs: Mapping[int, int]) -> None:
        """`pairs`: the teacher's ids by the student's."""
        self.student_ids = torch.tensor([*pairs], dtype=torch.int64)
        self.teacher_ids = torch.tensor([*pairs.values()], dtype=torch.int64)
        self._students = torch.full((max(pairs.values(), default=-1) + 2,), -1)  # the last: of an id that is higher
        self._students[self.teacher_ids] = self.student_ids

    def __len__(self) -> int:
        return len(self.student_ids)

    def within(self, student_rows: int | None, teacher_rows: int | None) -> CommonVocabulary:
        """Without the ids that a head of so many rows lacks; None: it has all."""
        rows = [torch.inf if each is None else each for each in (student_rows, teacher_rows)]
        pairs = zip(self.student_ids.tolist(), self.teacher_ids.tolist(), strict=True)
        return CommonVocabulary({ours: theirs for ours, theirs in pairs if ours < rows[0] and theirs < rows[1]})

    def listed(self, sample: Sample, theirs: TopK) -> TopK:
        """Lists at the counted tokens [m, k] of a teacher, in its ids, as lists at those [n, k] of the sample.

        An id of −1 is a token that the student does not have. Where the teacher begins no token too, all are.
        """
        ids = theirs.ids.long()
        known = self._students[ids.clamp(max=len(self._students) - 1)].where(ids >= 0, -1)
        begun = torch.from_numpy(sample.teacher_compared[sample.teacher_scored])
        places = torch.from_numpy(sample.compared[sample.loss_mask])
        shape = len(places), ids.shape[1]
        found = TopK(torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape))
        found.ids[places] = known[begun].int()
        found.logprobs[places] = theirs.logprobs[begun].where(known[begun] >= 0, 0.0)
        return found


def common_vocabulary(student: TokenBytes, teacher: TokenBytes, special: Mapping[int, int]) -> CommonVocabulary:
    """Tokens of equal bytes, and those that are `special`: the teacher's ids by the student's.

    Of several tokens that write the same, the one counts that the tokenizer writes itself, or else the first.
    """
    ours, theirs = _by_bytes(student), _by_bytes(teacher)
    same = {ours[text]: theirs[text] for text in ours if text in theirs}
    taken = {*special.values()}
    pairs = {one: other for one, other in same.items() if one not in special and other not in taken}
    return CommonVocabulary(dict(sorted({**pairs, **special}.items())))


def identical(tokens: TokenBytes) -> CommonVocabulary:
    """Of one tokenizer: all of its tokens."""
    return CommonVocabulary({token: token for token in range(tokens.count) if tokens[token]})


def one_to_one(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """The first pair of each id."""
    found, others = dict[int, int](), set[int]()
    for one, other in pairs:
        if one not in found and other not in others:
            found[one] = other
            others.add(other)
    return found


def _by_bytes(tokens: TokenBytes) -> dict[bytes, int]:
    """The tokens that no tokenizer reads as special, by what they write."""
    found = defaultdict[bytes, list[int]](list)
    for token in range(tokens.count):
        if tokens[token] and token not in tokens.special:
            found[tokens[token]].append(token)
    return {text: own[0] if len(own) == 1 else _written(tokens, text, own) for text, own in found.items()}


def _written(tokens: TokenBytes, text: bytes, own: list[int]) -> int:
    """Which of several tokens the tokenizer writes for a text, in the middle of another."""
    if "\ufffd" not in (decoded := text.decode(errors="replace")):
        (ids,) = tokens.encode([decoded], [own[0]])
        if len(ids) == 1 and ids[0] in own:
            return ids[0]
    return own[0]
