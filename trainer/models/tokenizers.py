"""What is asked of every tokenizer: its vocabulary, and what it makes of a text that is hard to split."""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

SAMPLE_TEXT = (
    "The quick brown fox: 3.14 + 2 = 5,14!\n\tdéjà vu — 日本語 🙂 def f(x): return x ** 2"
    # What tokenizers with one vocabulary split or normalise in different ways: long numbers, contractions, runs of white
    # space, capitals, accents that stand alone, wide letters, joined emoji.
    " 1234567890 don't I'LL  we   go\r\n\n\n    HTTPServer e\u0301 ｆｕｌｌ ﬁ 👩‍💻"
)
_REPLACEMENT = "\ufffd"
# Byte-level tokenizers write a byte that is no printable character as one of those from 256 on, in order: "Ġ" is a space.
_PRINTABLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


class Differences(NamedTuple):
    """Where two vocabularies are not one, by ids in order."""

    differing: list[tuple[int, str, str]]  # an id of both, and how each spells it
    lacking: list[tuple[int, str]]  # an id of the first that the second lacks


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """The ids of a tokenizer are those below this one."""
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def compare_vocabularies(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> Differences:
    """Every id of the first that can be in a text, beside the same id of the second; of padding only if both have it."""
    tokens, others = text_tokens(ours), text_tokens(theirs)
    ends = ours.bos_token_id, ours.eos_token_id, ours.unk_token_id
    pairs = ((token, spelling, others.get(token)) for token, spelling in sorted(tokens.items()))
    unequal = [pair for pair in pairs if pair[1] != pair[2]]
    return Differences(
        [(token, a, b) for token, a, b in unequal if b is not None and not _same(a, b)],
        [(token, a) for token, a, b in unequal if b is None and (token != ours.pad_token_id or token in ends)],
    )


def are_one(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> bool:
    """Whether every id of the first is the same token of the second, and both split a text alike."""
    splits = [tokenizer(SAMPLE_TEXT, add_special_tokens=False)["input_ids"] for tokenizer in (ours, theirs)]
    return compare_vocabularies(ours, theirs) == Differences([], []) and splits[0] == splits[1]


def text_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids and their spellings, without the rows that a converter names to fill a head up: [PAD151936] of GGUF files."""
    vocabulary = tokenizer.get_vocab().items()
    return {token: spelling for spelling, token in vocabulary if spelling != f"[PAD{token}]"}


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that were added to the vocabulary, special or not, in order; without filled rows."""
    known = text_tokens(tokenizer)
    return sorted(token for token in tokenizer.added_tokens_decoder if token in known)


def where_they_part(ours: list[int], theirs: list[int]) -> str:
    """The ids of one text from the first place on where two tokenizers differ."""
    pairs = zip(ours, theirs, strict=False)
    place = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"from token {place} on {ours[place : place + 8]}… and {theirs[place : place + 8]}…"


def first_three(items: list[str], separator: str) -> str:
    """The first three as a message names them, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more


def _same(a: str, b: str) -> bool:
    """Whether two spellings are of one token: "Ġthe" of one class is " the" or "▁the" of another."""
    if _readings(a) & _readings(b):
        return True
    # A part of a character, in a vocabulary that is written as text.
    for text, other in ((a, b), (b, a)):
        if _REPLACEMENT in text and text in {reading.decode(errors="replace") for reading in _readings(other)}:
            return True
    return False


def _readings(spelling: str) -> set[bytes]:
    """The texts that a spelling may stand for."""
    found = {spelling.encode(), spelling.replace("▁", " ").encode()}
    if all(character in BYTE_LEVEL for character in spelling):
        found.add(bytes(BYTE_LEVEL[character] for character in spelling))
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelling):
        found.add(bytes.fromhex(byte[1]))
    return found
