"""`fastkl init`: the config that it prints is one, comments and all, and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from run_cases import Run
from tiny_data import sums, write_jsonl

from fastkl import cli
from fastkl.trainer.commands.command_line import parse
from fastkl.trainer.commands.starter import starter
from fastkl.trainer.config.offline import InitConfig
from fastkl.trainer.config.training import DistillConfig

URL = "http://127.0.0.1:9/v1"
ARGUMENTS = [
    ("org/student", "org/teacher", "org/prompts"),
    ("./s", "~/t", "prompts.jsonl"),
    ("gpt2", "2024", "no"),
    ("a b: {c}", "'quoted' # it", 'mein "ä".jsonl'),
    ("s", URL, "rows.jsonl"),
]


def read(text: str, folder: Path) -> DistillConfig:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    config = parse(["distill", str(folder / "run.yaml")])[1]
    assert isinstance(config, DistillConfig)
    return config


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("student", "teacher", "data"), ARGUMENTS)
def test_every_line_is_of_a_config(
    student: str, teacher: str, data: str, chat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = starter(InitConfig(student, teacher, data, chat))
    assert 9 <= text.count("\n") <= 14
    assert max(map(len, text.split("\n"))) <= 124
    config = read(text, tmp_path)
    assert config.student.path == student
    if teacher == URL:
        assert (config.teacher.path, config.teacher.server.url, config.teacher.server.model) == ("", URL, "MODEL")
    else:
        assert config.teacher.path == teacher.replace("~", "/home/me")
    assert data in (config.data.path, config.data.dataset)
    assert (config.data.dataset is None) == (data != "org/prompts")
    assert config.data.chat_template == chat
    hints = re.sub(r"^# (?=\w+: )", "", text, flags=re.MULTILINE)
    assert read(hints, tmp_path) != config


def test_it_runs_as_it_is_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The models' context is 64 tokens and there are few rows: the config fits them."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", sums(3))
    assert cli.main(["init", "--chat", str(folder / "student"), str(folder / "teacher"), "rows.jsonl"]) == 0
    config = read(capsys.readouterr().out, tmp_path)
    assert (config.sampling.prompts_per_step, config.sampling.max_new_tokens) == (3, 32)
    assert cli.main(["distill", "run.yaml", "--optim.steps=5"]) == 0
    assert len(Run.of(tmp_path / "runs" / "first").metrics) == 5


def test_what_is_not_here_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "./s", "a/b/c", "d.jsonl"]) == 0
    shown = capsys.readouterr()
    names = ("STUDENT ./s", "TEACHER a/b/c", "DATA d.jsonl")
    assert shown.err.splitlines() == [f"fastkl: {name} does not exist (looked in {tmp_path})" for name in names]
    assert "does not exist" not in shown.out
    (tmp_path / "d.jsonl").write_text("")
    assert cli.main(["init", "org/student", URL, "d.jsonl"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_template_that_is_not_used_is_noted(
    chat: bool, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text('{"chat_template": "{{ messages }}"}')
    assert cli.main(["init", *(["--chat"] if chat else []), str(tmp_path), URL, "org/data"]) == 0
    assert ("has a chat template; with --chat" in capsys.readouterr().err) != chat


@pytest.mark.parametrize("end", ["", "/"])
def test_a_runs_folder_is_its_student(end: str, tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (student / "config.json").write_text('{"max_position_embeddings": 64}')
    (tmp_path / "run" / "config.yaml").write_text("")
    name = f"{tmp_path / 'run'}{end}"
    config = read(starter(InitConfig(name, name, "d.jsonl", False)), tmp_path)
    assert (config.student.path, config.teacher.path) == (str(student), str(student))
    assert config.sampling.max_new_tokens == 32
    hints = starter(InitConfig(name, name, "d.jsonl", False)).replace("# eval:", "eval:")
    assert read(hints, tmp_path).eval.max_new_tokens == 32


@pytest.mark.parametrize("chat", [False, True])
def test_chats_are_no_prompts_that_are_continued(chat: bool, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    text = starter(InitConfig("s", "t", str(data), chat))
    assert "# messages go through the chat template" in text
    assert "continued as they are" not in text
