"""A completion in its teacher's tokens: what both read alike is in segments, and nothing else."""

from __future__ import annotations

import functools
import itertools
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY
from real_tokenizers import real_tokenizer
from tiny_models import tokenizer
from tiny_tokenizers import byte_level, sentencepiece
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from fastkl.trainer.teachers.alignment.completion import Aligned, Translator
from fastkl.trainer.teachers.alignment.segments import NOWHERE
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes

BEFORE = 3  # the id before a completion, no special one
LETTERS = [
    "a",
    "ab",
    "e\u0301",
    "é",
    " ",
    "  ",
    "\n",
    "\t",
    "▁",
    "日本",
    "🙂",
    "👩\u200d💻",
    "x=1;",
    "\ufffd",
    "<0x41>",
    "</s>",
]
TEXTS = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(LETTERS), max_size=8).map("".join))


def composed() -> PreTrainedTokenizerFast:
    """It changes texts, as Qwen's does."""
    words = byte_level()
    words.backend_tokenizer.normalizer = normalizers.NFC()
    return words


@functools.cache
def tiny(name: str) -> TokenBytes:
    made = {
        "bytes": byte_level,
        "composed": composed,
        "first": sentencepiece,
        "always": lambda: sentencepiece("always", eos_token="</s>"),
        "legacy": lambda: sentencepiece("legacy", eos_token="</s>"),
        "spaced": lambda: byte_level(spaced=True, eos_token="</s>"),
        "letters": tokenizer,
    }
    return TokenBytes(made[name]())


TINY = ["bytes", "composed", "first", "always", "legacy", "spaced", "letters"]


def aligned(student: TokenBytes, teacher: TokenBytes, ids: list[int]) -> Aligned:
    return Translator(student, teacher).aligned([ids], [BEFORE], [BEFORE])[0]


def check(student: TokenBytes, teacher: TokenBytes, ids: list[int]) -> float:
    """Each segment holds the same bytes of both, in whole tokens, in order. Returns the share of tokens in segments."""
    found = aligned(student, teacher, ids)
    texts = []
    for known, tokens, places in (
        (student, ids, found.segments.student_of),
        (teacher, found.teacher_ids.tolist(), found.segments.teacher_of),
    ):
        assert len(places) == len(tokens)
        inside = places[places != NOWHERE]
        assert sorted(set(inside.tolist())) == list(range(found.segments.count))
        assert (np.diff(inside) >= 0).all()
        written, lengths = known.written(tokens, BEFORE)
        own = np.bincount(inside, lengths[places != NOWHERE], found.segments.count)
        assert own.tolist() == found.segments.lengths.tolist()
        texts.append([written[slice(*_ends(lengths, places, number))] for number in range(found.segments.count)])
    assert texts[0] == texts[1]
    return float((found.segments.student_of != NOWHERE).mean()) if ids else 1.0


def _ends(lengths: np.ndarray, places: np.ndarray, number: int) -> tuple[int, int]:
    own = np.flatnonzero(places == number)
    assert own[-1] - own[0] == len(own) - 1
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return int(bounds[own[0]]), int(bounds[own[-1] + 1])


@hypothesis.settings(PROPERTY, max_examples=50)
@given(st.sampled_from(TINY), st.sampled_from(TINY), st.data())
def test_any_text_and_any_ids(student: str, teacher: str, data: st.DataObject) -> None:
    ours, theirs = tiny(student), tiny(teacher)
    ids = ours.encode([data.draw(TEXTS)], [BEFORE])[0]
    check(ours, theirs, ids[data.draw(st.integers(0, 2)) : len(ids) - data.draw(st.integers(0, 2))])
    check(ours, theirs, data.draw(st.lists(st.integers(0, len(ours.tokenizer) + 1), max_size=12)))


@PROPERTY
@given(TEXTS)
def test_of_one_tokenizer_nothing_changes(text: str) -> None:
    for name in TINY:
        known = tiny(name)
        ids = known.encode([text], [BEFORE])[0]
        if name == "composed" or known.tokenizer.unk_token_id in ids or "▁" in text or "</s>" in text:
            continue
        found = aligned(known, known, ids)
        assert found.teacher_ids.tolist() == ids
        assert found.segments.student_of.tolist() == found.segments.teacher_of.tolist() == list(range(len(ids)))


def test_a_cut_letter() -> None:
    ids = tiny("bytes").encode(["ab🙂"], [BEFORE])[0]
    found = aligned(tiny("bytes"), tiny("first"), ids[:-1])
    assert found.segments.student_of.tolist() == [0, 0, NOWHERE, NOWHERE]
    assert found.segments.lengths.tolist() == [2]
    assert found.teacher_ids.tolist() == tiny("first").encode(["ab\ufffd"], [BEFORE])[0]


def test_what_a_normaliser_changes() -> None:
    ids = tiny("bytes").encode(["abc e\u0301 and so on"], [BEFORE])[0]
    found = aligned(tiny("bytes"), tiny("composed"), ids)
    gone = found.segments.student_of == NOWHERE
    assert tiny("bytes").join(np.array(ids)[gone]) == "e\u0301".encode()
    assert tiny("composed").join(found.teacher_ids[found.segments.teacher_of == NOWHERE]) == "é".encode()


def test_special_tokens_are_theirs_where_they_were_ours() -> None:
    ours, theirs = byte_level(eos_token="</s>"), sentencepiece(eos_token="</s>")
    ours.add_tokens(["<think>"])
    theirs.add_special_tokens({"additional_special_tokens": ["<think>"]})
    student, teacher = TokenBytes(ours), TokenBytes(theirs)
    end, think = theirs.eos_token_id, theirs.convert_tokens_to_ids("<think>")
    a, b = (theirs.convert_tokens_to_ids(letter) for letter in "ab")
    ids = [*ours.encode("a"), ours.eos_token_id, *ours.convert_tokens_to_ids(["b", "<think>"])]
    found = aligned(student, teacher, ids)
    assert found.teacher_ids.tolist() == [a, end, b, think]
    assert found.segments.lengths.tolist() == [1, 4, 1, 7]
    spelled = aligned(student, teacher, student.encode(["</s>"], [BEFORE])[0])
    assert end not in spelled.teacher_ids
    assert spelled.segments.lengths.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["first", "always", "legacy", "spaced"])
def test_a_space_that_a_tokenizer_puts_there_is_no_part_of_the_text(name: str) -> None:
    """Of the first token neither too much nor too little: it is a segment like any, after whatever token."""
    ids = tiny("bytes").encode(["ab"], [BEFORE])[0]
    words = tiny(name).tokenizer
    words.add_tokens(["<think>"])
    known = TokenBytes(words)
    for before in (None, BEFORE, known.tokenizer.eos_token_id, words.convert_tokens_to_ids("<think>")):
        (found,) = Translator(tiny("bytes"), known).aligned([ids], [BEFORE], [before])
        assert found.segments.lengths.sum() == 2
        assert NOWHERE not in found.segments.teacher_of
        back = Translator(known, tiny("bytes")).aligned([found.teacher_ids.tolist()], [before], [BEFORE])[0]
        assert back.teacher_ids.tolist() == ids
        for side in ((tiny("bytes"), known), (known, tiny("bytes"))):  # one that ends at once writes nothing
            assert Translator(*side).aligned([[]], [before], [before])[0].segments.count == 0


def test_white_space_that_an_added_token_swallows_is_in_no_segment() -> None:
    words = byte_level()
    words.add_tokens(AddedToken("<think>", lstrip=True, rstrip=True, special=False))
    ids = tiny("bytes").encode(["ab  <think> ab"], [BEFORE])[0]
    found = aligned(tiny("bytes"), TokenBytes(words), ids)
    assert tiny("bytes").join(np.array(ids)[found.segments.student_of == NOWHERE]) == b"   a"
    assert found.segments.lengths.tolist() == [1, 1, 7, 1]


def test_ids_that_are_no_tokens_count_for_nothing() -> None:
    ids = tiny("bytes").encode(["ab"], [BEFORE])[0]
    found = aligned(tiny("bytes"), tiny("first"), [ids[0], 10**6, ids[1], 10**6])
    assert found.segments.student_of.tolist() == [0, NOWHERE, 0, NOWHERE]
    assert found.segments.teacher_of.tolist() == [0]


def test_nothing() -> None:
    assert Translator(tiny("bytes"), tiny("first")).aligned([], [], []) == []
    assert aligned(tiny("bytes"), tiny("first"), []).segments.count == 0


REAL = ["qwen", "llama", "gemma", "phi", "olmo", "smollm", "mistral", "deepseek"]
CODE = (
    "def f(x):\n\treturn {'naïve': x ** 2}  # 日本語 🙂👩‍💻\r\n\n" + " don't 1234567890 ﬁ ｆｕｌｌ Ⅷ" + "nospaces" * 5
)


@functools.cache
def real(name: str) -> TokenBytes:
    return TokenBytes(real_tokenizer(name))


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(REAL, REAL)])
def test_real_tokenizers(student: str, teacher: str) -> None:
    ours, theirs = real(student), real(teacher)
    ids = ours.encode([CODE], [BEFORE])[0]
    assert check(ours, theirs, ids) == 1.0
    found = aligned(ours, theirs, ids)
    assert (found.segments.teacher_of != NOWHERE).all()
    assert found.segments.count > 0.4 * max(len(ids), len(found.teacher_ids))
    for start in range(4):  # of every letter, some part is missing
        check(ours, theirs, ids[start::5])

    @PROPERTY
    @given(TEXTS)
    def any_text(text: str) -> None:
        check(ours, theirs, ours.encode([text], [BEFORE])[0])

    any_text()


@pytest.mark.slow
def test_time_grows_with_the_tokens_alone() -> None:
    ours, theirs = real("llama"), real("gemma")
    times = []
    for copies in (2_000, 20_000):
        ids = ours.encode([CODE], [BEFORE])[0] * copies
        translator = Translator(ours, theirs)
        start = time.process_time()
        translator.aligned([ids], [BEFORE], [BEFORE])
        times.append(time.process_time() - start)
    assert times[1] < 20 * times[0]
