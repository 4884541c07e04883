"""What is settled of a text stays as it is, whatever follows; so few tokens answer for what is not."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from property_settings import PROPERTY
from tiny_tokenizers import byte_level, sentencepiece

from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes
from fastkl.trainer.teachers.alignment.unsettled import MOST, Unsettled

TEXTS = st.text("ab x1é🙂 ", max_size=10)


def test_by_hand() -> None:
    known = Unsettled([b"a", b"b", b"ab", b"bc", b"1", b" a"])
    assert known.begins(b"abcab1").tolist() == [0, 0, 0, 0, 3, 3, 5]
    assert known.begins(b"").tolist() == [0]
    assert known.back(b"abcab1", np.array([1, 1, 1, 2, 1, 0])).tolist() == [0, 1, 2, 3, 1, 1]
    assert known.back(b"", np.array([0, 0])).tolist() == [0, 0]
    assert Unsettled([b"aa"]).begins(b"a" * 20).tolist() == [max(0, n - MOST) for n in range(21)]
    assert Unsettled([]).begins(b"ab").tolist() == [0, 0, 1]


@PROPERTY
@given(TEXTS, TEXTS)
def test_what_follows_changes_nothing_before(first: str, more: str) -> None:
    for words in (byte_level(), sentencepiece("first")):
        known = TokenBytes(words)
        text, whole = first.encode(), (first + more).encode()
        begins = int(Unsettled(known.all).begins(text)[-1])
        ends = []
        for part in (first, first + more):
            _, lengths = known.written(known.encode([part], [3])[0], 3)
            ends.append([end for end in np.cumsum(lengths).tolist() if end <= begins])
        assert ends[0] == ends[1]
        assert whole.startswith(text)
