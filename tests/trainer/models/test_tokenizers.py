"""Two tokenizers are one where every token that a student writes is the same for its teacher; the teacher may have more."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_tokenizers import real_tokenizer, real_tokenizer_folder
from tiny_models import CHARACTERS, tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkl.trainer.errors import ConfigError
from fastkl.trainer.models.checks import check_tokenizers
from fastkl.trainer.models.tokenizers import added_tokens, compare_vocabularies

END = len(tokenizer())  # the first id that a token can be added at
MERGES = [("1", "2"), ("2", "3"), ("Ġ", "a")]


def with_added(*texts: str, special: bool = False) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.add_tokens(list(texts), special_tokens=special)
    return words


def byte_level(
    merges: list[tuple[str, str]] = MERGES, digits: bool = False, wide: bool = True
) -> PreTrainedTokenizerFast:
    """All bytes and a few merges, in any order."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "23", "Ġa"]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    core.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.normalizer = None if wide else normalizers.NFKC()
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_is_another_is_named(special: bool) -> None:
    with pytest.raises(
        ConfigError, match=rf"id {END} is '<think>' in the student's and '<thought>' in the teacher's\."
    ):
        check_tokenizers(with_added("<think>", special=special), with_added("<thought>", special=special))


def test_the_first_three_that_the_teacher_lacks_are_named() -> None:
    student = with_added("<a1>", "<a2>", "<a3>", "<a4>", "<a5>")
    named = rf"lacks ids of the student, {END} '<a1>', {END + 1} '<a2>', {END + 2} '<a3>' and 2 more\."
    with pytest.raises(ConfigError, match=named):
        check_tokenizers(student, tokenizer())
    with pytest.raises(ConfigError, match=rf"lacks ids of the student, {END + 4} '<a5>'\."):
        check_tokenizers(student, with_added("<a1>", "<a2>", "<a3>", "<a4>"))


def test_a_teacher_with_more_tokens_passes() -> None:
    check_tokenizers(tokenizer(), with_added("<think>", "</think>"))
    check_tokenizers(with_added("<think>"), with_added("<think>", "</think>"))


def test_rows_that_fill_a_head_are_no_tokens() -> None:
    """As converters from GGUF files name them: one side has them, or other tokens are in their places."""
    filled = with_added(*(f"[PAD{token}]" for token in range(END, END + 5)))
    check_tokenizers(filled, tokenizer())
    check_tokenizers(tokenizer(), filled)
    check_tokenizers(filled, with_added("<think>"))
    with pytest.raises(ConfigError, match=rf"lacks ids of the student, {END} '<think>'\."):
        check_tokenizers(with_added("<think>"), filled)
    with pytest.raises(ConfigError, match=r"'\[PAD7\]'"):  # the name of another row is a text like any
        check_tokenizers(with_added("[PAD7]"), tokenizer())


def test_a_token_for_padding_alone_may_be_the_students_own() -> None:
    student = tokenizer()
    student.add_special_tokens({"pad_token": "<pad>"})
    check_tokenizers(student, tokenizer())
    student.eos_token = "<pad>"  # it ends completions too
    with pytest.raises(ConfigError, match=rf"lacks ids of the student, {END} '<pad>'"):
        check_tokenizers(student, tokenizer())


BEHAVIOURS = {
    "merges": byte_level(MERGES[::-1]),
    "pre-tokenizer": byte_level(digits=True),
    "normalizer": byte_level(wide=False),
}


@pytest.mark.parametrize("teacher", BEHAVIOURS.values(), ids=BEHAVIOURS)
def test_one_vocabulary_used_in_another_way_is_found_by_a_text(teacher: PreTrainedTokenizerFast) -> None:
    check_tokenizers(byte_level(), byte_level())
    with pytest.raises(ConfigError, match=r"the same text gives \d+ and \d+ tokens, from token \d+ on \["):
        check_tokenizers(byte_level(), teacher)


def spelled(words: list[str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(dict(zip(words, range(99), strict=False))))
    )


def test_one_token_may_be_spelled_in_several_ways() -> None:
    """By bytes as characters, as text with spaces, as SentencePiece has it; parts of characters have no text."""
    ways = [
        spelled(["Ġthe", "Ċ", "æĹ¥", "æĹ", "a"]),
        spelled([" the", "\n", "日", "\ufffd", "a"]),
        spelled(["▁the", "<0x0A>", "日", "\ufffd", "a"]),
    ]
    for ours in ways:
        for theirs in ways:
            assert compare_vocabularies(ours, theirs) == ([], [])
    other = spelled(["Ġthe", "Ċ", "æĹ¥", "æĸ", "a"])  # another part of a character
    assert compare_vocabularies(ways[0], other).differing == [(3, "æĹ", "æĸ")]
    assert compare_vocabularies(spelled(["the"]), spelled([" the"])).differing == [(0, "the", " the")]


def test_added_tokens_are_those_beyond_the_vocabulary_and_the_special_ones() -> None:
    words = with_added("<think>", f"[PAD{END + 1}]")
    assert [token for token in added_tokens(words) if token >= len(CHARACTERS)] == [END]


# A change to the file of a real tokenizer.
THINKING = ("<tool_response>", "</tool_response>", "<think>", "</think>")


def without_thinking(file: dict[str, Any]) -> None:
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in THINKING]


def renamed(file: dict[str, Any]) -> None:
    next(token for token in file["added_tokens"] if token["content"] == "<think>")["content"] = "<thought>"


def filled(file: dict[str, Any]) -> None:
    token = next(token for token in file["added_tokens"] if not token["special"])
    file["added_tokens"] += [{**token, "id": row, "content": f"[PAD{row}]"} for row in range(151669, 151936)]


def changed(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    shutil.copytree(real_tokenizer_folder(name), folder)
    for file, edit in (
        ("tokenizer.json", change),
        ("tokenizer_config.json", lambda c: c.pop("added_tokens_decoder", 0)),
    ):
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        edit(content)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def test_qwen_beside_one_that_cannot_think(tmp_path: Path) -> None:
    qwen, older = real_tokenizer("qwen"), changed(tmp_path / "older", "qwen", without_thinking)
    check_tokenizers(older, qwen)
    with pytest.raises(
        ConfigError, match="151665 '<tool_response>', 151666 '</tool_response>', 151667 '<think>' and 1 more"
    ):
        check_tokenizers(qwen, older)
    with pytest.raises(ConfigError, match="id 151667 is '<think>' in the student's and '<thought>' in the teacher's"):
        check_tokenizers(qwen, changed(tmp_path / "renamed", "qwen", renamed))


def test_qwen_beside_one_whose_vocabulary_fills_its_head(tmp_path: Path) -> None:
    qwen, padded = real_tokenizer("qwen"), changed(tmp_path / "filled", "qwen", filled)
    assert len(padded) == 151936
    check_tokenizers(qwen, padded)
    check_tokenizers(padded, qwen)


def test_two_models_with_one_vocabulary_and_other_turns() -> None:
    """SmolLM3 has Llama 3's tokens, but for what it made of the reserved ones."""
    with pytest.raises(
        ConfigError, match=r"'<\|reserved_special_token_0\|>' in the student's and '<think>'.*and 7 more"
    ):
        check_tokenizers(real_tokenizer("llama"), real_tokenizer("smollm"))


@pytest.mark.parametrize("name", ["gemma", "mistral", "phi", "falcon", "deepseek", "yi"])
def test_a_real_tokenizer_is_itself(name: str) -> None:
    check_tokenizers(real_tokenizer(name), copy.deepcopy(real_tokenizer(name)))
