"""Files of `fastkl eval` and `fastkl score`: they grow, go on after any end, and are never overwritten; runs as models."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from run_settings import arguments, distillation, evaluated
from tiny_data import read_jsonl, sums, write_jsonl

from fastkl import cli
from fastkl.trainer.commands import evaluate, score
from fastkl.trainer.commands.output import Output

COMMANDS = ("eval", "score")
SOURCE = {"eval": "eval.data.path", "score": "data.path"}


def line(command: str, folder: Path, output: Path, **more: object) -> list[str]:
    settings = {"model.path": folder / "student", SOURCE[command]: folder / "sums.jsonl", "output": output}
    settings |= {"eval.max_new_tokens": 6, "eval.temperature": 1} if command == "eval" else {}
    return arguments(command, settings | {name.replace("__", "."): value for name, value in more.items()})


@pytest.fixture(autouse=True)
def pieces_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.AT_ONCE, "cpu", 5)
    monkeypatch.setattr(score, "AT_ONCE", 5)


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException, command: list[str], after: int) -> int:
    """The exit status of a command to which this happens as it writes, after so many pieces."""
    pieces = []
    original = os.fsync

    def failing(file: int) -> None:
        pieces.append(file)
        if len(pieces) > after:
            raise error
        original(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        return cli.main(command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on after row"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "make room, and the same command goes on"),
    ],
    ids=["interrupted", "full-disk"],
)
def test_what_was_answered_is_kept(
    command: str,
    after: int,
    error: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "new" / "cut.jsonl"
    assert cli.main(line(command, folder, whole)) == 0
    printed = capsys.readouterr().out
    assert ended(monkeypatch, error, line(command, folder, cut), after) == status
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message
    assert "of 12" in message
    before = read_jsonl(cut)
    assert len(before) >= 5 * after
    assert before == read_jsonl(whole)[: len(before)]
    with open(cut, "a", encoding="utf-8") as file:
        file.write('{"torn": ')
    assert cli.main(line(command, folder, cut)) == 0
    assert capsys.readouterr().out == printed.replace(str(whole), str(cut))
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_not_computed_again(
    command: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.jsonl"
    assert cli.main(line(command, folder, output)) == 0
    printed, before = capsys.readouterr().out, output.read_bytes()

    def computed(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(evaluate, "evaluate", computed)
    monkeypatch.setattr("fastkl.trainer.teachers.local.LocalTeacher.score", computed)
    assert cli.main(line(command, folder, output)) == 0
    assert capsys.readouterr().out == printed
    assert output.read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", ["setting", "rows", "weights"])
def test_a_file_made_from_something_else_is_refused(
    command: str, change: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, data = tmp_path / "rows.jsonl", write_jsonl(tmp_path / "d.jsonl", sums(3))
    model = tmp_path / "model"
    model.symlink_to(folder / "student")
    given: dict[str, object] = {SOURCE[command]: data, "model.path": model}
    assert cli.main(line(command, folder, output, **given)) == 0
    before = output.read_bytes()
    if change == "setting":
        given |= {"eval.temperature": 2} if command == "eval" else {"temperature": 2}
    elif change == "rows":
        write_jsonl(data, sums(4))
    else:
        model.unlink()
        model.symlink_to(folder / "teacher")
    assert cli.main(line(command, folder, output, **given)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "holds rows of another config" in error
    assert {"setting": "temperature was 1", "rows": "rows was", "weights": "weights was"}[change] in error
    assert output.read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_exists_is_never_touched(
    command: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    output.write_text("a month of work")
    assert cli.main(line(command, folder, output, model__path="./nosuch")) == 2
    assert f"output {output} exists already" in capsys.readouterr().err
    assert output.read_text() == "a month of work"


@pytest.mark.parametrize("name", [".", "d.jsonl/o.jsonl", "/proc/o.jsonl"])
def test_an_output_that_cannot_be_is_refused_first(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d.jsonl", sums(3))
    assert cli.main(line("eval", tmp_path, Path(name), model__path="./nosuch")) == 2
    assert f"output {name}" in capsys.readouterr().err


def test_any_text_is_written(tmp_path: Path) -> None:
    """JSON can spell half of a surrogate pair, which UTF-8 cannot."""
    output = Output(str(tmp_path / "o.jsonl"), {})
    output.begin(1)
    row = {"answer": "\ud800", "metadata": {"\udfff": ["ä", {"x": "\u2028"}]}}
    output.add([row])
    assert read_jsonl(tmp_path / "o.jsonl") == [row]
    again = Output(str(tmp_path / "o.jsonl"), {})
    again.begin(1)
    assert again.rows == [row]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("runs") / "a"
    settings = evaluated(folder, student__lora__rank=2, student__dtype="bfloat16", optim__steps=1, eval__grader="boxed")
    assert cli.main(arguments("distill", distillation(path, folder, **settings))) == 0
    return path


def test_a_run_is_evaluated_by_its_folder(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Model and precision, rows and grader are the run's."""
    assert cli.main(["eval", str(run)]) == 0
    by_folder = json.loads(capsys.readouterr().out)
    settings = {"model.path": run / "student", "model.dtype": "bfloat16", "eval.data.path": folder / "sums.jsonl"}
    assert cli.main(arguments("eval", settings | {"eval.max_new_tokens": 4, "eval.grader": "boxed"})) == 0
    assert by_folder == json.loads(capsys.readouterr().out)
    assert cli.main(["eval", str(run), "--eval.data.limit=3", "--eval.max_new_tokens=2"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/mean_length"] <= 2


def test_a_run_is_scored_by_its_folder(run: Path, folder: Path, tmp_path: Path) -> None:
    assert cli.main(["score", str(run), "--output", str(tmp_path / "a")]) == 0
    settings = {"model.path": run / "student", "model.dtype": "bfloat16"}
    assert cli.main(line("score", folder, tmp_path / "b", **settings)) == 0
    assert read_jsonl(tmp_path / "a") == read_jsonl(tmp_path / "b")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("eval", "has no student yet"),
        ("score", "has no student yet"),
        ("distill", "to go on with that run"),
        ("sft", "--run"),
    ],
)
def test_folders_that_will_not_do(
    command: str, part: str, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert cli.main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
