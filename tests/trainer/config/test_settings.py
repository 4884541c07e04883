"""Names of before are refused wherever they stand, with the name that they have now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from run_settings import MINIMAL, arguments, config

from fastkl import cli
from fastkl.trainer.config.training import as_dict
from fastkl.trainer.runs.settings import RENAMED, Renamed, flat

Place = Callable[[Renamed, Path], list[str]]


def old_value(old: Renamed) -> str:
    return "0.1" if old.value is None else old.value


def on_the_command_line(old: Renamed, folder: Path) -> list[str]:
    return [*arguments("distill", MINIMAL["distill"]), f"--{old.setting}={old_value(old)}"]


def after_its_name(old: Renamed, folder: Path) -> list[str]:
    return [*arguments("distill", MINIMAL["distill"]), f"--{old.setting}", old_value(old)]


def in_a_yaml(old: Renamed, folder: Path) -> list[str]:
    group, name = old.setting.split(".")
    (folder / "run.yaml").write_text(yaml.safe_dump({"run": "runs/a", group: {name: old_value(old)}}))
    return ["distill", "run.yaml"]


def in_a_run_folder(old: Renamed, folder: Path) -> list[str]:
    """What an earlier version left there."""
    line = arguments("distill", MINIMAL["distill"])
    settings = as_dict(config("distill", MINIMAL["distill"]))
    group, name = old.setting.split(".")
    settings[group][name] = old_value(old)
    (folder / "runs" / "a").mkdir(parents=True)
    (folder / "runs" / "a" / "config.yaml").write_text(yaml.safe_dump(settings))
    return line


@pytest.mark.parametrize("place", [on_the_command_line, after_its_name, in_a_yaml, in_a_run_folder])
@pytest.mark.parametrize("old", RENAMED, ids=lambda old: old.setting)
def test_old_names(
    old: Renamed, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = place(old, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastkl: ")
    assert error.count("\n") == 1
    assert f"{old.setting}{'' if old.value is None else f': {old.value}'} is now {old.now}" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_old_name_in_an_entry_of_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = {"mixture": {"math": {"teacher": {"base_of_student": True}}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"run": "runs/a", **teacher}))
    assert cli.main(["distill", str(tmp_path / "run.yaml")]) == 2
    assert "teacher.base_of_student is now teacher.self" in capsys.readouterr().err


def test_what_replaces_an_old_name_exists() -> None:
    settings = dict(flat(as_dict(config("distill", MINIMAL["distill"]))))
    for old in RENAMED:
        name, _, value = old.now.partition(": ")
        assert name in settings
        config("distill", MINIMAL["distill"] | ({name: value} if value else {}))
