"""The bytes of tokens, however a vocabulary spells them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from real_tokenizers import real_tokenizer
from tiny_models import CHARACTERS, tokenizer
from tiny_tokenizers import META, byte_level, sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.tokenizers import SAMPLE_TEXT
from fastkl.trainer.teachers.alignment.token_bytes import TokenBytes


def ids_of(words: PreTrainedTokenizerFast, *entries: str) -> list[int]:
    return [words.get_vocab()[entry] for entry in entries]


def test_byte_level() -> None:
    words = byte_level()
    known = TokenBytes(words)
    assert known.join(ids_of(words, "Ġa", "ðŁ", "ĺ", "Ģ", "Ċ")) == " a😀\n".encode()
    assert known.lengths(ids_of(words, "Ġa", "ðŁ", "ĺ")).tolist() == [2, 2, 1]


def test_sentencepiece_with_byte_fallback() -> None:
    words = sentencepiece()
    known = TokenBytes(words)
    assert known.join(ids_of(words, f"{META}a", "<0xF0>", "<0x0A>", "ab", META)) == b" a\xf0\nab "
    assert known.lengths(ids_of(words, META, "<0x20>")).tolist() == [1, 1]


def test_one_character_a_token() -> None:
    known = TokenBytes(tokenizer())
    assert known.join(known.encode(["1+1 =2."], [None])[0]) == b"1+1 =2."


@pytest.mark.parametrize("words", [byte_level(), sentencepiece(), tokenizer()], ids=["bytes", "pieces", "words"])
def test_added_tokens_write_their_own_text(words: PreTrainedTokenizerFast) -> None:
    words.add_tokens(["naïve", "a▁b", "two words"])
    words.add_special_tokens({"eos_token": AddedToken("<｜end▁of｜>", special=True, lstrip=True)})
    known = TokenBytes(words)
    for text in ("naïve", "a▁b", "two words", "<｜end▁of｜>"):
        assert known[words.convert_tokens_to_ids(text)] == text.encode()


def test_an_added_token_that_the_vocabulary_has_is_spelled_as_it_is_there() -> None:
    """As "Ċ" of Falcon's tokenizer: every line ends with it."""
    words = byte_level()
    words.add_tokens(["Ċ"])
    assert TokenBytes(words)[words.get_vocab()["Ċ"]] == b"\n"


def test_rows_without_a_token_write_nothing() -> None:
    words = byte_level()
    size = len(words)
    words.add_tokens([f"[PAD{size}]", "[PAD7]"])
    known = TokenBytes(words)
    assert known.lengths([size, size + 1, size + 2, 10**6, -1]).tolist() == [0, 6, 0, 0, 0]
    assert known.join([size, 10**6]) == b""
    assert known.lengths(np.empty(0)).dtype == np.int32


def test_no_special_token_is_read_out_of_a_text() -> None:
    words = byte_level(eos_token="<|end|>")
    ids = TokenBytes(words).encode(["a<|end|>"], [None])[0]
    assert words.eos_token_id not in ids
    assert len(ids) == 8


def cut(**parts: Any) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "▁": 3}, []))
    for name, part in parts.items():
        setattr(core, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=core)


UNKNOWN = {
    "WordPiece": (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0}))), "WordPiece"),
    "suffix": (lambda: cut(model=models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "'</w>'"),
    "decoder": (lambda: cut(decoder=decoders.CTC()), "decoder CTC"),
    "strip": (lambda: cut(decoder=decoders.Strip(" ", 1, 0)), "decoder Strip"),
    "no decoder": (lambda: cut(normalizer=normalizers.Replace(" ", "▁")), r"tokens of 'a .' would write b'a\\xe2"),
    "no text": (lambda: cut(model=models.BPE({}, [])), "none of its tokens is a text"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_tokenizer_whose_bytes_cannot_be_known_is_refused(case: str) -> None:
    words, why = UNKNOWN[case]
    with pytest.raises(ConfigError, match=f"bytes of the judge's tokens cannot be known: .*{why}"):
        TokenBytes(words(), "judge")


class InPython:
    """A tokenizer without a backend, as a model's own code brings it."""

    def __init__(self, vocabulary: dict[Any, int], written: dict[str, int], **parts: object) -> None:
        self._vocabulary, self._written = vocabulary, written
        self.unk_token_id, self.added_tokens_decoder = None, dict[int, AddedToken]()
        vars(self).update(parts)

    def get_vocab(self) -> dict[Any, int]:
        return self._vocabulary

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self._written[letter] for letter in text] for text in texts]}


def test_a_space_before_a_text_is_none_of_its_own() -> None:
    """SentencePiece puts it there: after a special token, or at the very beginning alone."""
    for scheme, spaced in (("always", True), ("first", False)):
        words = sentencepiece(scheme, eos_token="</s>")
        known, end = TokenBytes(words), words.eos_token_id
        (space, first, after), a, b = known.encode(["ab"] * 3, [None, 5, end]), *ids_of(words, "a", "ab")
        assert space == ids_of(words, f"{META}a") + ids_of(words, "b")
        assert first == [b]
        assert after == (space if spaced else [b])
        for ids, before in ((space, None), (first, 5), (after, end)):
            text, lengths = known.written(ids, before)
            assert text == b"ab"
            assert lengths.sum() == 2
        assert known.written([end, *ids_of(words, f"{META}a"), a], None)[0] == b"</s>" + b" "[spaced:] + b"aa"
        assert known.written(ids_of(words, META, "a"), None)[1].tolist() == [0, 1]
        assert [known.written([], before)[0] for before in (None, 5, end)] == [b""] * 3


def test_a_special_token_that_a_tokenizer_reads_all_the_same() -> None:
    class Deaf(PreTrainedTokenizerFast):
        def __call__(self, *texts: Any, **options: Any) -> Any:
            return super().__call__(*texts, **(options | {"split_special_tokens": False}))

    words = Deaf(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|end|>", pad_token="<|")
    text = "a<|end|><|<|end|>"
    ids = TokenBytes(words).encode([text], [None])[0]
    assert ids == byte_level().encode(text)


def test_tokenizers_in_python() -> None:
    written = {"a": 0, " ": 1}
    ranks = {b"a": 0, b" ": 1, b"\xf0\x9f": 2}
    assert TokenBytes(InPython(ranks, written))[2] == b"\xf0\x9f"  # type: ignore[arg-type]
    pieces = InPython({"a": 0, "▁": 1, "<0xF0>": 2}, written, sp_model=object())
    assert TokenBytes(pieces).join([1, 2, 0]) == b" \xf0a"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="written in Python"):
        TokenBytes(InPython({"a": 0}, written))  # type: ignore[arg-type]


REAL = ["qwen", "llama", "gemma", "phi", "olmo", "smollm", "deepseek", "falcon", "mistral", "yi"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name: str) -> None:
    words = real_tokenizer(name)
    known = TokenBytes(words)
    text = SAMPLE_TEXT.replace("e\u0301", "é")  # which Qwen would write for it
    written = known.join(known.encode([text], [None])[0]).decode()
    assert written.removeprefix(" " if name in ("mistral", "yi") else "") == text
    assert known.lengths(range(len(words))).max() > 10
    end = words.eos_token
    assert known[words.eos_token_id] == end.encode()
    assert words.eos_token_id not in known.encode([f"a{end}b"], [None])[0]


def test_the_characters_of_the_tiny_tokenizer() -> None:
    known = TokenBytes(tokenizer())
    assert [known[token] for token in tokenizer().convert_tokens_to_ids(list(CHARACTERS))] == [
        letter.encode() for letter in CHARACTERS
    ]
