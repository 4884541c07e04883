"""Reading and encoding prompts: errors name the line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from tiny_data import write_jsonl
from tiny_models import tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.formats.packed import Packed
from fastkl.trainer.data.prompts import encode_completions, encode_prompts
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.errors import ConfigError

GOOD = b'{"prompt": "1+1="}\n'


def load(path: Path, **settings: object) -> Packed[Prompt]:
    return load_prompts(DataConfig(path=str(path), **settings))  # type: ignore[arg-type]


BAD_ROWS = {
    "no-keys": (b"{}", "must have exactly one of `prompt` and `messages`; it has []"),
    "other-keys": (b'{"question": "1+1"}', "must have exactly one of `prompt` and `messages`; it has ['question']"),
    "both-keys": (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "exactly one of"),
    "null-prompt": (b'{"prompt": null}', "exactly one of"),
    "number-as-prompt": (b'{"prompt": 7}', "`prompt` is a int; expected text or a list of messages"),
    "no-messages": (b'{"messages": []}', "`messages` must be a list of objects with `role` and `content`"),
    "text-as-messages": (b'{"messages": "hello"}', "`messages` must be a list"),
    "turn-without-content": (b'{"messages": [{"role": "user"}]}', "turn 1 (user) has no `content`"),
    "text-as-turn": (b'{"messages": ["hello"]}', "`messages` must be a list"),
    "turn-as-messages": (b'{"messages": {"role": "user", "content": "a"}}', "`messages` must be a list"),
    "number-as-completion": (b'{"prompt": "a", "completion": 2}', "`completion` is a int; expected text"),
    "list-as-answer": (b'{"prompt": "a", "answer": ["1"]}', "`answer` is a list; expected text or a number"),
    "text-as-metadata": (b'{"prompt": "a", "metadata": "m"}', "`metadata` is a str; expected an object"),
    "half-a-surrogate": (b'{"prompt": "a \\ud800"}', "`prompt` holds half of a surrogate pair"),
    "number-as-role": (
        b'{"messages": [{"role": 1, "content": "a"}]}',
        "`messages` must be a list of objects with `role`",
    ),
    "brackets-without-end": (b"[" * 100_000, "cannot be read as JSON"),
    "list": (b"[1, 2]", "is a list; expected an object"),
    "number": (b"17", "is a int; expected an object"),
    "null": (b"null", "is a NoneType; expected an object"),
    "cut-off": (b'{"prompt": "a"', "is not a JSON object"),
    "no-json": (b"prompt: a", "is not a JSON object: Expecting value at column 1"),
    "latin-1": (b'{"prompt": "d\xe9j\xe0"}', "is not UTF-8"),
}


@pytest.mark.parametrize(("line", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert f"{path}:3" in str(error.value)  # the empty line 2 counts
    assert message in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "blank-lines"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl holds no rows"):
        load(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "."], ids=["missing", "folder"])
def test_a_file_that_is_not_there_is_named_with_the_folder(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(Path(name))
    assert name in str(error.value)
    assert str(Path.cwd()) in str(error.value)


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = [
        {"prompt": "1+1=", "answer": 2, "completion": "2", "other": 1},
        {"messages": chat},
        {"prompt": "a\u2028b\x85"},
    ]
    path = tmp_path / "prompts.jsonl"
    text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # as Windows editors save it
    path.write_bytes(text.encode())
    prompts = load(path)
    assert [p.prompt for p in prompts] == ["1+1=", chat, "a\u2028b\x85"]
    assert [p.source for p in prompts] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert (prompts[0].answer, prompts[0].completion) == ("2", "2")
    assert prompts[0].metadata == {}
    assert (prompts[1].answer, prompts[1].completion) == (None, None)


def test_rows_that_are_equal_are_rows_of_their_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1", "metadata": {"a": [1]}}] * 3)
    prompts = load(path)
    assert [p.source for p in prompts] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert prompts[0].metadata == {"a": [1]}


def test_a_completion_without_tokens_is_refused(tmp_path: Path) -> None:
    words = tokenizer(eos_token=None)
    encoded = encode_prompts(
        load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1", "completion": ""}])), words, DataConfig()
    )
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: `completion` has no tokens"):
        encode_completions(encoded, words)


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(GOOD * 2 + b"broken")
    assert len(load(path, limit=2)) == 2
    with pytest.raises(ConfigError, match=":3"):
        load(path, limit=3)


def test_offset_and_limit_cut_a_slice_and_slices_are_the_whole(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{number}"} for number in range(4)])
    rows = load_prompts(DataConfig(path=str(tmp_path)))  # a folder: rows are counted over its files
    for offset in range(8):
        for limit in range(1, 10):
            data = DataConfig(path=str(tmp_path), offset=offset, limit=limit)
            assert [*load_prompts(data)] == rows[offset : offset + limit]
    with pytest.raises(ConfigError, match=r"holds no rows after the first 8, which data\.offset skips"):
        load_prompts(DataConfig(path=str(tmp_path), offset=8))


def encode(rows: list[Prompt], words: PreTrainedTokenizerFast, chat_template: bool) -> list[list[int]]:
    return [p.ids for p in encode_prompts(rows, words, DataConfig(path="p", chat_template=chat_template))]


def test_chat_template_on_text_off_text_and_messages(tmp_path: Path) -> None:
    words = tokenizer()
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    rows = load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1="}, {"messages": chat}, {"prompt": "2"}]))
    wanted = {True: ["<u>1+1=<a>", "<s>s<u>u<a>", "<u>2<a>"], False: ["1+1=", "<s>s<u>u<a>", "2"]}
    for chat_template, texts in wanted.items():  # a chat needs the template whatever the setting
        ids = encode(rows, words, chat_template)
        assert [words.decode(row) for row in ids] == texts


def test_missing_chat_template_names_the_row_and_the_setting(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = None
    rows = load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1+1="}]))
    with pytest.raises(ConfigError, match=r"p\.jsonl:1: .*no chat template.*data\.chat_template to false"):
        encode(rows, words, True)
    assert len(encode(rows, words, False)[0]) == 4


def test_special_tokens_come_once(tmp_path: Path) -> None:
    """A template that writes the start token, in a tokenizer that adds it too."""
    words = tokenizer(bos_token="<s>")
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    words.chat_template = "<s>" + str(words.chat_template)
    rows = load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1", "completion": "2"}]))
    assert encode(rows, words, True)[0].count(3) == 1
    assert encode(rows, words, False)[0].count(3) == 1
    encoded = encode_prompts(rows, words, DataConfig(path="p"))
    assert 3 not in encode_completions(encoded, words)[0]


def test_max_prompt_tokens_leaves_out_the_longer_ones(tmp_path: Path) -> None:
    prompts = load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "1" * length} for length in (5, 3, 4)]))
    config = DataConfig(path="p", chat_template=False, max_prompt_tokens=4)
    assert [p.row.prompt for p in encode_prompts(prompts, tokenizer(), config)] == ["111", "1111"]
    config = DataConfig(path="p", chat_template=False, max_prompt_tokens=2)
    with pytest.raises(ConfigError, match=r"max_prompt_tokens is 2.*none of the 3 prompts"):
        encode_prompts(prompts, tokenizer(), config)


def test_completion_ends_with_the_end_token(tmp_path: Path) -> None:
    words, config = tokenizer(), DataConfig(path="p")
    rows = [{"prompt": "1", "completion": "23"}, {"prompt": "1", "completion": ""}, {"prompt": "1"}]
    encoded = encode_prompts(load(write_jsonl(tmp_path / "p.jsonl", rows)), words, config)
    end = words.eos_token_id
    assert encode_completions(encoded[:2], words) == [[*words.convert_tokens_to_ids(["2", "3"]), end], [end]]
    with pytest.raises(ConfigError, match=r"p\.jsonl:3: no `completion`"):
        encode_completions(encoded, words)


@pytest.mark.parametrize(
    ("single", "text", "wanted"),
    [
        ("<s> $A", "1", "<s>1"),
        ("<s> $A", "<s>1", "<s>1"),
        ("<s> $A", " \n<s>1", "<s>1"),
        ("<s> $A <eos>", "1", "<s>1"),
        ("$A <eos>", "1", "1"),
        ("<s> <u> $A", "1", "<s><u>1"),
        ("<s> <u> $A", "<s><u>1", "<s><u>1"),
        ("<s> $A", "<s><s>1", "<s><s>1"),  # as it stands
        ("$A <eos>", "1<eos>", "1<eos>"),
        ("$A", "1", "1"),
    ],
)
def test_a_text_begins_once_and_does_not_end(single: str, text: str, wanted: str) -> None:
    """With what the tokenizer puts first, unless the text has it; without what it puts last."""
    words = tokenizer(bos_token="<s>")
    tokens = [(token, words.convert_tokens_to_ids(token)) for token in ("<s>", "<u>", "<eos>")]
    words.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    (ids,) = encode([Prompt("p:1", text)], words, False)
    assert words.decode(ids) == wanted


def test_ids_of_a_completion_are_those_of_the_whole_text() -> None:
    """A tokenizer that puts a space before a text puts none before its continuation; a token over the seam is cut."""
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(["<e>", "▁", "a", "b", "ab", "▁a"])}, [("▁", "a")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    rows = [Prompt("p:1", "b", completion="a"), Prompt("p:2", "b ", completion="a")]
    encoded = encode_prompts(rows, words, DataConfig(path="p", chat_template=False))
    assert [p.ids for p in encoded] == [[1, 3], [1, 3, 1]]
    assert encode_completions(encoded, words) == [[2, 0], [5, 0]]


def test_a_row_takes_little_memory(tmp_path: Path) -> None:
    """A run holds all rows: a million short ones are to stay below a gigabyte."""
    count, data = 1000, tmp_path / "rows.jsonl"
    write_jsonl(data, ({"prompt": f"{i}+{i * 7}=", "answer": str(i * 8)} for i in range(count)))
    settings, made = DataConfig(path=str(data), chat_template=False), tokenizer()
    first = encode_prompts(load_prompts(settings), made, settings)  # makes what is made once
    tracemalloc.start()
    try:
        prompts = encode_prompts(load_prompts(settings), made, settings)
        taken = tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()
    assert len(prompts) == len(first) == count
    assert taken < 700, f"{taken:.0f} bytes a row"
