"""A run's folder in place of a config: its student is the model, and its evaluation gives the rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from fastkl.trainer.commands.given import Place
from fastkl.trainer.commands.values import TEXT
from fastkl.trainer.commands.yaml_file import read_file
from fastkl.trainer.config.models import ModelConfig
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.notes import note
from fastkl.trainer.runs.changes import read_settings
from fastkl.trainer.runs.files import read_jsonl
from fastkl.trainer.runs.settings import flat

STUDENT = "student"
Found = tuple[str, yaml.Node, Place]


def settings_of_run(command: str, folder: Path) -> list[Found]:
    """What `fastkl eval RUN`, `fastkl sample RUN` and `fastkl score RUN` take from a run.

    Raises:
        ConfigError: If the folder is no run, if its student is not there yet, or if the command takes no folder.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{folder} is a folder without a config.yaml, so no run; name a CONFIG.yaml")
    if command not in ("eval", "sample", "score"):
        raise ConfigError(
            f"{folder} is a run's folder; to go on with that run: fastkl {command} {file} --run {folder}; for another "
            f"one, give its CONFIG.yaml"
        )
    student = folder / STUDENT
    if not (student / "config.json").is_file():
        raise ConfigError(f"{folder} has no student yet; the run writes it after its last step")
    given = {name: (node, place) for name, node, place in read_file(file)}
    return [*_model(given["student"], student), *_rows(command, given)]


def note_of_student(path: Path) -> None:
    """Says of the student in a run's folder that the run has gone on since, or has begun to."""
    file = path.parent / "config.yaml"
    if path.name != STUDENT or not (path.is_dir() and file.is_file()):
        return
    try:
        steps = dict(flat(read_settings(file))).get("optim.steps")
    except ConfigError:
        return  # the file need not be one of a run
    logged = [row["step"] for row in read_jsonl(path.parent / "metrics.jsonl") if isinstance(row.get("step"), int)]
    if logged and isinstance(steps, int) and logged[-1] < steps:
        note(
            f"{path.parent} is at step {logged[-1]} of {steps}: it is not finished, and its student is that of an earlier "
            f"end"
        )


def _model(student: tuple[yaml.Node, Place], path: Path) -> list[Found]:
    """The settings that every model has, of the student, and its new path."""
    node, place = student
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"path"}
    kept = [
        (f"model.{key.value}", value, place._replace(line=key.start_mark.line + 1))
        for key, value in node.value
        if key.value in names
    ]
    return [*kept, ("model.path", yaml.ScalarNode(TEXT, str(path)), place)]


def _rows(command: str, given: dict[str, tuple[yaml.Node, Place]]) -> list[Found]:
    """The evaluation of the run; what is sampled is its data; what is scored is the rows of the evaluation, if any."""
    if command == "eval":
        return [("eval", *given["eval"])]
    if command == "sample":
        return [("data", *given["data"])]
    (data,) = (value for key, value in given["eval"][0].value if key.value == "data")
    held_out = any(key.value in ("path", "dataset") and value.tag == TEXT for key, value in data.value)
    return [("data", data, given["eval"][1])] if held_out else [("data", *given["data"])]
