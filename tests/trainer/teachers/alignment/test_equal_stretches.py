"""Where two texts are equal, found in one pass."""

from __future__ import annotations

import time
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY

from fastkl.trainer.teachers.alignment.equal_stretches import equal_stretches
from fastkl.trainer.teachers.alignment.segments import Block

FEW = st.text("ab é", max_size=60).map(str.encode)


@PROPERTY
@given(st.one_of(FEW, st.binary(max_size=60)), st.one_of(FEW, st.binary(max_size=60)))
def test_stretches_are_equal_and_in_order(ours: bytes, theirs: bytes) -> None:
    blocks = equal_stretches(ours, theirs)
    i = j = 0
    for block in blocks:
        assert block.student >= i
        assert block.teacher >= j
        i, j = block.student + block.length, block.teacher + block.length
        assert ours[block.student : i] == theirs[block.teacher : j]
    assert blocks[0][:2] == (0, 0)
    assert (i, j) == (len(ours), len(theirs))


@PROPERTY
@given(FEW, st.text("xyü").map(str.encode), st.text("xyü").map(str.encode), FEW)
def test_what_differs_in_one_place_is_equal_elsewhere(before: bytes, ours: bytes, theirs: bytes, after: bytes) -> None:
    before, after = b"<" + before + b"0123456789", b"abcdefghij" + after + b">"
    found = sum(block.length for block in equal_stretches(before + ours + after, before + theirs + after))
    assert found >= len(before) + len(after)


def test_of_one_text_it_is_all() -> None:
    assert equal_stretches(b"", b"") == [Block(0, 0, 0)]
    assert equal_stretches(b"\xffa", b"\xffa") == [Block(0, 0, 2)]


def test_a_composed_letter() -> None:
    ours = "caf\u0065\u0301 au lait".encode()
    theirs = unicodedata.normalize("NFC", ours.decode()).encode()
    assert equal_stretches(ours, theirs) == [Block(0, 0, 3), Block(6, 5, 8)]


def test_a_long_stretch_that_one_lacks() -> None:
    blocks = equal_stretches(b"first part " + b" " * 5000 + b"second part", b"first part second part")
    assert blocks == [Block(0, 0, 11), Block(5011, 11, 11)]


def test_time_grows_with_the_text_alone() -> None:
    hard = "e\u0301 word " * 20_000
    start = time.process_time()
    blocks = equal_stretches(hard.encode(), unicodedata.normalize("NFC", hard).encode())
    nothing = equal_stretches(b"a" * 200_000, b"b" * 200_000)
    assert time.process_time() - start < 6.0
    assert len(blocks) == 20_001
    assert nothing == [Block(0, 0, 0), Block(200_000, 200_000, 0)]
