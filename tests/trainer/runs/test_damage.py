"""Damaged run folders: what is whole is used, what is not is named in one sentence, and nothing else is touched."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_cases import check_equal, distilled, interrupt, refusal
from run_settings import Settings, arguments, distillation

from fastkl import cli
from fastkl.trainer.runs.folder import LOGS
from fastkl.trainer.runs.seal import NAME, Damaged, check_seal, seal

FILES = ("model.safetensors", "optimizer.bin", "state.pt", NAME)


def settings(folder: Path, run: Path) -> Settings:
    return distillation(run, folder, optim__steps=3, checkpoint__every=1, checkpoint__keep=2)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run to which nothing happened."""
    return distilled(settings(folder, tmp_path_factory.mktemp("run") / "whole"))


@pytest.fixture(scope="module")
def two_steps(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in its third step, with two checkpoints; tests copy it."""
    path = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, settings(folder, path), 2)
    return path


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


HARM: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped": flip_a_bit,
    "a-folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize(("file", "harm"), list(itertools.product(FILES, HARM)))
def test_a_seal_tells_every_damage(tmp_path: Path, two_steps: Path, file: str, harm: str) -> None:
    path = Path(shutil.copytree(two_steps / "checkpoints" / "step-000002", tmp_path / "step"))
    check_seal(path)
    HARM[harm](path / file)
    with pytest.raises(Damaged, match=file):
        check_seal(path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"state.pt": 1}', "[" * 100_000, "\x00"], ids=lambda text: text[:6])
def test_checksums_that_say_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.pt").write_bytes(b"state")
    seal(tmp_path)
    (tmp_path / NAME).write_text(text)
    with pytest.raises(Damaged, match=NAME):
        check_seal(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty-folder"])
def test_the_checkpoint_before_a_damaged_one_is_used(
    folder: Path, run: Path, whole: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    newest = run / "checkpoints" / "step-000002"
    if damage == "empty-folder":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        HARM[damage](newest / "optimizer.bin")
    assert cli.main(arguments("distill", settings(folder, run))) == 0
    said = capsys.readouterr().err
    assert f"{newest} is damaged: " in said
    assert f"resumed {run} after step 1" in said
    assert (run / "checkpoints" / "step-000002.damaged").is_dir()
    check_equal(run, whole)


def test_no_checkpoint_that_is_whole(folder: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / "checkpoints").iterdir():
        HARM["cut"](path / "model.safetensors")
    before = sorted(path for path in run.rglob("*"))
    error = refusal(capsys, "distill", settings(folder, run), "step-000002: model.safetensors has ", "step-000001")
    assert "step-000002: model.safetensors" in error.splitlines()[-1]
    assert sorted(path for path in run.rglob("*")) == before


def test_steps_count_as_numbers_and_other_names_are_left_alone(folder: Path, run: Path, whole: Path) -> None:
    checkpoints = run / "checkpoints"
    (checkpoints / "step-000001").rename(checkpoints / "step-1")
    (checkpoints / "step-000002").rename(checkpoints / "step-0000000002")
    for other in ("step-abc", "step-9x", "step-"):
        (checkpoints / other).mkdir()
    check_equal(distilled(settings(folder, run)), whole)
    assert {path.name for path in checkpoints.iterdir()} == {
        "step-abc",
        "step-9x",
        "step-",
        "step-000003",
        "step-0000000002",
    }


@pytest.mark.parametrize(
    "line", ["5", "{}", "[" * 200_000, '{"step": "2"}', '{"step": true}', "null"], ids=lambda t: t[:9]
)
def test_lines_of_a_log_that_belong_to_no_step_are_dropped(folder: Path, run: Path, whole: Path, line: str) -> None:
    for name in LOGS:
        with open(run / name, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    check_equal(distilled(settings(folder, run)), whole)
