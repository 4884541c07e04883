"""Rows of files, folders and data sets: what is read, how a row is called, and one sentence for the rest."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_data import write_jsonl

from fastkl.trainer.config.data import DataConfig
from fastkl.trainer.data.rows import Prompt
from fastkl.trainer.data.sources import load_prompts
from fastkl.trainer.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "answer": "1"},
    {"prompt": "b", "answer": "2"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHATS = [
    {
        "messages": [{"role": "user", "content": "q"}],
        "tools": [{"name": "f", "parameters": {"a": {"type": "text"}}}],
        "metadata": {"a": 1},
    },
    {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4", "name": "x"}],
        "tools": [{"name": "g", "parameters": {"b": {"type": "text"}}}],
        "metadata": {"a": None},
    },
]


def load(path: Path, **settings: Any) -> list[Prompt]:
    return [*load_prompts(DataConfig(path=str(path), **settings))]


@pytest.mark.parametrize(
    ("name", "content", "sources"),
    [
        ("d.jsonl", LINES, ":1 :2"),
        ("d.ndjson", LINES, ":1 :2"),
        ("d.txt", LINES, ":1 :2"),
        ("d", LINES, ":1 :2"),
        ("d.json", LINES, ":1 :2"),
        ("d.json", json.dumps(ROWS).encode(), "#1 #2"),
        ("d.JSON", b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=1).encode(), "#1 #2"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0), ":1 :2"),
        ("d.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0), "#1 #2"),
    ],
)
def test_files_of_json(name: str, content: bytes, sources: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    prompts = load(path)
    assert [p.prompt for p in prompts] == ["a", "b"]
    assert [p.source for p in prompts] == [f"{path}{place}" for place in sources.split()]
    assert load(path, limit=1) == prompts[:1]
    assert load(path, offset=1) == prompts[1:]


def test_one_object_over_many_lines(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert [p.source for p in load(path)] == [f"{path}#1"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"PAR1....", "is not JSON but a Parquet file; let its name end in .parquet"),
        ("d.jsonl", gzip.compress(LINES, mtime=0), "is not JSON but compressed by gzip; let its name end in .gz"),
        ("d.jsonl", b"PK\x03\x04...", "is not JSON but a ZIP archive"),
        ("d.jsonl.gz", LINES, "is no whole gzip file"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "is no whole gzip file"),
        (
            "d.jsonl",
            json.dumps(ROWS, indent=1).encode(),
            "is one JSON value over many lines; let its name end in .json",
        ),
        ("d.json", json.dumps(ROWS).encode()[:-3], "d.json#2 is not a JSON object: Unterminated string"),
        ("d.json", json.dumps(ROWS, indent=1).encode() + b"]", "d.json#3 is not a JSON object: Extra data"),
        ("d.json", b"[1]", "d.json#1 is a int; expected an object"),
        ("d.json", b"[]", "holds no rows"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "README.md").write_text("no data")
    assert [p.prompt for p in load(tmp_path)] == ["a", "b"]
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"is a folder without data; expected files \.jsonl"):
        load(tmp_path)


def test_home_and_variables_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "d.jsonl", ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROWS", str(tmp_path))
    assert len(load(Path("~/d.jsonl"))) == len(load(Path("$ROWS/d.jsonl"))) == 2


def test_columns_that_nothing_reads_are_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2, "\x1b[2J": 3}])
    load(path)
    assert capsys.readouterr().err == f"fastkl: {path}: nothing reads the columns 'level', '\\x1b[2J'\n"
    load(write_jsonl(tmp_path / "e.jsonl", ROWS))
    assert capsys.readouterr().err == ""


def test_columns_under_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "a", "solution": "4", "answer": "so 4", "prompt": "p"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    (row,) = load(path, columns={"prompt": "question", "answer": "solution", "completion": "answer"})
    assert (row.prompt, row.answer, row.completion) == ("a", "4", "so 4")
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ConfigError, match=r"d\.jsonl:1 has no column 'q', which data\.columns names; it has \['answer'"
    ):
        load(path, columns={"prompt": "q"})
    with pytest.raises(ConfigError, match=r"data\.columns has 'question'; rows have the columns prompt, messages"):
        DataConfig(path="d", columns={"question": "prompt"})


def test_settings_that_would_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.name is 'main'.*data\.dataset is null"):
        DataConfig(path="d", name="main")
    with pytest.raises(ConfigError, match=r"data\.split is 'test', but .* has no splits"):
        load(write_jsonl(tmp_path / "d.jsonl", ROWS), split="test")


def test_dataset_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'owner/sums'.*pip install datasets.*data\.path"):
        load_prompts(DataConfig(dataset="owner/sums"))


def test_what_load_dataset_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: str, split: str) -> list[dict[str, str]]:
        asked.append((*names, split))
        return [{"prompt": "a"}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (row,) = load_prompts(DataConfig(dataset="owner/sums", split="test", limit=1))
    assert row == Prompt("owner/sums[test]:1", "a")
    with pytest.raises(ConfigError, match=r"owner/sums\[train\]:2"):
        load_prompts(DataConfig(dataset="owner/sums", name="main"))
    assert asked == [("owner/sums", "test"), ("owner/sums", "main", "train")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("BuilderConfig 'x' not found. Available: ['main']"), "Available: ['main']"),
        (ConnectionError("Couldn't reach\n'owner/sums' \x1b[2J on the Hub"), r"'owner/sums' \x1b[2J on the Hub"),
        (RuntimeError(""), "RuntimeError"),
    ],
)
def test_what_load_dataset_raises_is_one_sentence(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*names: str, split: str) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        ConfigError, match=r"data\.dataset is 'owner/sums'.*data\.name 'x' and data\.split 'train'"
    ) as e:
        load_prompts(DataConfig(dataset="owner/sums", name="x"))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "module"), [("d.parquet", "pyarrow"), ("saved", "datasets")], ids=["parquet", "save_to_disk"]
)
def test_a_package_that_is_missing_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "saved").mkdir()
    for file in ("d.parquet", "saved/state.json"):
        (tmp_path / file).touch()
    with pytest.raises(ConfigError, match=rf"pip install {module}"):
        load(tmp_path / name)


def test_real_tables(tmp_path: Path) -> None:
    """Tables fill keys that other rows have with null: they are no keys of these rows."""
    datasets: Any = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(CHATS)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    folder = tmp_path / "folder"
    for config in ("main", "other"):
        (folder / config).mkdir(parents=True)
        table.to_parquet(folder / config / "test.parquet")
    entries = [
        f"- config_name: {c}\n  data_files: [{{split: test, path: {c}/test.parquet}}]\n" for c in ("main", "other")
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(entries)}---\n")
    for data in (
        DataConfig(path=str(tmp_path / "d.parquet")),
        DataConfig(path=str(tmp_path / "one")),
        DataConfig(path=str(tmp_path / "two"), split="test"),
        DataConfig(path=str(folder / "main")),
        DataConfig(dataset=str(folder), name="main", split="test"),
    ):
        first, second = load_prompts(data)
        assert first.prompt == [{"role": "user", "content": "q"}]
        assert (first.tools, second.tools) == (CHATS[0]["tools"], CHATS[1]["tools"])
        assert second.reply == {"role": "assistant", "content": "4", "name": "x"}
        assert second.metadata == {"a": None}
    for data, message in (
        (DataConfig(path=str(tmp_path / "two"), split="x"), "has the splits 'train', 'test'"),
        (DataConfig(path=str(tmp_path / "one"), split="x"), "has no splits"),
        (DataConfig(dataset=str(folder)), "['main', 'other']"),
        (DataConfig(dataset=str(folder), name="x"), "['main', 'other']"),
        (DataConfig(dataset=str(folder), name="main", split="x"), "['test']"),
        (DataConfig(dataset=str(tmp_path / "one")), "name it in data.path instead"),
    ):
        with pytest.raises(ConfigError) as error:
            load_prompts(data)
        assert message in str(error.value)
    (tmp_path / "d.parquet").write_bytes(LINES)
    (tmp_path / "one" / "state.json").write_text("{}")
    for name in ("d.parquet", "one"):
        with pytest.raises(ConfigError, match=f"{name} could not be"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("d.csv", "is a CSV file; convert it to JSON Lines or Parquet"),
        ("d.CSV.gz", "is a CSV file"),
        ("d.arrow", "is an Arrow file; give the folder"),
        ("d.jsonl.bz2", "is compressed by bzip2; unpack it"),
        ("d.txt", "is a text file without JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused_in_words(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"prompt,answer\n1,2\n")
    with pytest.raises(ConfigError) as error:
        load_prompts(DataConfig(path=str(tmp_path / name)))
    assert message in str(error.value)
