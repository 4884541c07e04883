"""Which tokens two tokenizers have in common, and a teacher's lists in the student's ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_tokenizers import byte_level, sentencepiece

from fastkl.loss import TopK
from fastkl.trainer.data.samples import Sample
from fastkl.trainer.teachers.alignment.common import CommonVocabulary, one_to_one
from fastkl.trainer.teachers.alignment.pair import TokenizerPair
from fastkl.trainer.teachers.lists import packed


def spelled(common: CommonVocabulary, pair: TokenizerPair) -> list[tuple[bytes, bytes]]:
    ids = zip(common.student_ids.tolist(), common.teacher_ids.tolist(), strict=True)
    return [(pair.ours[ours], pair.theirs[theirs]) for ours, theirs in ids]


@pytest.mark.parametrize("turned", [False, True])
def test_tokens_of_equal_bytes_are_common(turned: bool) -> None:
    """Also where one of them spells a byte, and each once: of `a` and <0x61> it is `a` that a text has."""
    both = byte_level(eos_token="</s>"), sentencepiece(eos_token="<end>")
    pair = TokenizerPair(*(both[::-1] if turned else both))
    common = pair.common([])
    found = spelled(common, pair)
    assert all(ours == theirs for ours, theirs in found)
    assert {ours for ours, _ in found} == {bytes([byte]) for byte in range(256)} | {b" a"}
    for ids in (common.student_ids, common.teacher_ids):
        assert len(ids.unique()) == len(ids) == len(common)
    letters, ids = (pair.ours, common.student_ids) if turned else (pair.theirs, common.teacher_ids)
    known = letters.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert ("c" in known, "<0x63>" in known, "<0x64>" in known) == (True, False, True)


def test_the_ends_of_turns_are_one_token() -> None:
    student, teacher = byte_level(eos_token="</s>", pad_token="<pad>"), byte_level(eos_token="<end>", bos_token="<pad>")
    pair = TokenizerPair(student, teacher)
    ends = (student.eos_token_id, teacher.eos_token_id)
    known = dict(zip(*(ids.tolist() for ids in _ids(pair.common([ends]))), strict=True))
    assert known[ends[0]] == ends[1]
    assert known[student.pad_token_id] == teacher.bos_token_id
    assert student.eos_token_id not in _ids(pair.common([]))[0].tolist()


def _ids(common: CommonVocabulary) -> tuple[torch.Tensor, torch.Tensor]:
    return common.student_ids, common.teacher_ids


def test_a_special_token_is_no_text_of_the_other() -> None:
    """`ab` is two letters that the teacher reads as one token, and a special token of the student."""
    pair = TokenizerPair(byte_level(eos_token="ab"), sentencepiece())
    assert (b"ab", b"ab") not in spelled(pair.common([]), pair)


def test_one_tokenizer_has_all_in_common() -> None:
    pair = TokenizerPair(byte_level(eos_token="</s>"), byte_level(eos_token="</s>"))
    student, teacher = _ids(pair.common([]))
    assert torch.equal(student, teacher)
    assert len(student) == pair.ours.count


def test_heads_may_lack_ids() -> None:
    student, teacher = _ids(CommonVocabulary({0: 5, 3: 1, 7: 2}).within(7, 5))
    assert (student.tolist(), teacher.tolist()) == ([3], [1])
    assert len(CommonVocabulary({}).within(7, None)) == 0


def test_an_id_is_in_one_pair() -> None:
    assert one_to_one([(1, 2), (1, 3), (4, 2), (5, 6)]) == {1: 2, 5: 6}


def test_lists_are_of_the_students_ids_where_both_begin_a_token() -> None:
    """Three tokens of the student, two of the teacher; a fourth one counts and is in no segment."""
    sample = Sample(
        ids=np.full(5, 9),
        loss_mask=np.array([False, True, True, True, True]),
        prompt_index=0,
        completion_length=4,
        segments=np.array([0, 1, 1, 2, 0]),
        teacher_prompt=np.array([8]),
        teacher_completion=np.array([8, 8, 8]),
        teacher_segments=np.array([1, 2, 2]),
    )
    theirs = TopK(
        torch.tensor([[7, 1, 50], [3, 7, -1], [1, 1, 1]], dtype=torch.int32),
        -torch.arange(1.0, 10.0).reshape(3, 3),
    )
    common = CommonVocabulary({20: 1, 10: 3})
    found = packed(common.listed(sample, theirs))
    assert found.ids.tolist() == [[20, -1, -1], [-1, -1, -1], [10, -1, -1], [-1, -1, -1]]
    assert found.logprobs.tolist() == [[-2, 0, 0], [0, 0, 0], [-4, 0, 0], [0, 0, 0]]
    assert np.array_equal(sample.compared, [False, True, False, True, False])
    sample.teacher_top_k = TopK(torch.tensor([[20], [-1], [-1], [-1]]), torch.zeros(4, 1))
    assert np.array_equal(sample.compared, [False, True, False, False, False])
