"""Which pairs of tokenizers look ahead."""

from __future__ import annotations

import copy

import pytest
from segment_cases import PAIRED, words
from tiny_models import CHARACTERS, tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastkl.trainer.teachers.alignment.pair import TokenizerPair


def singly() -> PreTrainedTokenizerFast:
    """It has the tokens of pairs, and makes none of a text."""
    made = copy.deepcopy(words("pairs"))
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<eos>|<u>|<s>|<a>|."), "isolated")
    return made


OTHERS = {
    "the same": (words("pairs"), False, True),
    "other ids": (tokenizer(f"{CHARACTERS}<>"[::-1], pairs_of=PAIRED), False, False),
    "other tokens": (words("characters"), True, False),
    "other splits": (singly(), True, False),
}


@pytest.mark.parametrize(("teacher", "looks_ahead", "one"), OTHERS.values(), ids=OTHERS)
def test_it_looks_ahead_unless_both_split_alike(teacher: PreTrainedTokenizerFast, looks_ahead: bool, one: bool) -> None:
    pair = TokenizerPair(words("pairs"), teacher)
    assert (pair.looks_ahead, pair.one) == (looks_ahead, one)
