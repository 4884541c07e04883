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
from fastkl.trainer.commands import answering, score
from fastkl.trainer.commands.output import Output
from fastkl.trainer.errors import ConfigError

COMMANDS = ("eval", "sample", "score")
SOURCE = {"eval": "eval.data.path", "sample": "data.path", "score": "data.path"}
TEMPERATURE = {"eval": "eval.temperature", "sample": "sampling.temperature", "score": "temperature"}


def line(command: str, folder: Path, output: Path, **more: object) -> list[str]:
    settings = {"model.path": folder / "student", SOURCE[command]: folder / "sums.jsonl", "output": output}
    settings |= {
        "eval": {"eval.max_new_tokens": 6, "eval.temperature": 1},
        "sample": {"sampling.max_new_tokens": 6},
    }.get(command, {})
    return arguments(command, settings | {name.replace("__", "."): value for name, value in more.items()})


@pytest.fixture(autouse=True)
def pieces_of_five(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(answering.AT_ONCE, "cpu", 5)
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

    monkeypatch.setattr(answering, "answers_to", computed)
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
        given |= {TEMPERATURE[command]: 2}
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
    row = {"source": "d:1", "answer": "\ud800", "metadata": {"\udfff": ["ä", {"x": "\u2028"}]}}
    with Output(str(tmp_path / "o.jsonl"), {}, {}) as output:
        output.begin(["d:1"])
        output.add([row])
    assert read_jsonl(tmp_path / "o.jsonl") == [row]
    with Output(str(tmp_path / "o.jsonl"), {}, {}) as again:
        again.begin(["d:1"])
        assert again.rows == [row]


def rows_of(file: Path, total: int) -> list[dict[str, object]]:
    """What a command that answers so many rows finds in the file."""
    with Output(str(file), {}, {"score": (int, float)}) as output:
        output.begin([f"d:{line}" for line in range(1, total + 1)])
        return output.rows


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A file with three rows."""
    with Output(str(tmp_path / "o.jsonl"), {}, {}) as output:
        output.begin(["d:1", "d:2", "d:3"])
        output.add([{"source": f"d:{line}", "score": 1.0} for line in (1, 2, 3)])
    return tmp_path / "o.jsonl"


def test_one_command_at_a_time_writes(tmp_path: Path, three: Path) -> None:
    """The second is refused at once; where nothing was written nothing is left."""
    for file in (three, tmp_path / "new" / "deep" / "o.jsonl"):
        with Output(str(file), {}, {}):
            with pytest.raises(ConfigError, match=f"output {file}: another process is writing to it"):
                Output(str(file), {}, {}).__enter__()
            with Output(str(file.with_name("other.jsonl")), {}, {}):
                pass
    assert not (tmp_path / "new").exists()
    assert len(rows_of(three, 4)) == 3


def test_more_rows_than_the_data_has_are_refused(three: Path) -> None:
    with pytest.raises(ConfigError, match="holds 3 rows, but the data has 2"):
        rows_of(three, 2)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("garbage", "is not JSON"),
        ("\0\0", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", "is a list, not an object"),
        ('{"a": 1}', "has no source"),
        ('{"source": "d:2"}', "has no score"),
        ('{"source": "d:2", "score": "x"}', "has the score 'x'"),
        ('{"source": "d:1", "score": 1}', "is of d:1, and d:2 comes here"),
    ],
)
def test_a_damaged_row_is_named(damage: str, said: str, three: Path) -> None:
    """Which is left as it is; a last line that was cut short is dropped."""
    whole = three.read_text()
    three.write_text(whole + '{"sour')
    assert len(rows_of(three, 4)) == 3
    lines = whole.splitlines()
    three.write_text("\n".join([lines[0], damage, lines[2], '{"sour']))
    before = three.read_bytes()
    with pytest.raises(ConfigError) as refused:
        rows_of(three, 4)
    assert f"{three}:2 {said}" in str(refused.value)
    assert "take out this line and all after it" in str(refused.value)
    assert three.read_bytes() == before


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
