"""What may differ when a run goes on: which settings, and the record of those that were changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastkl.trainer.config.rules import default_of
from fastkl.trainer.config.training import DistillConfig, RunConfig, SftConfig, as_dict
from fastkl.trainer.errors import ConfigError
from fastkl.trainer.runs.files import read_jsonl, write_text
from fastkl.trainer.runs.settings import flat, refuse_renamed

NAME = "changes.jsonl"
OWN = ("run", "resume")  # of a command, not of a run: a run may be moved
# What a run computes does not depend on these.
FREE = re.compile(
    r"log_samples|trackers|push_to_hub|push_private|eval\.every|checkpoint\..*|guards\..*"
    r"|batch\.max_tokens|student\.gradient_checkpointing"
    r"|(mixture\.[\w-]+\.)?teacher\.cache(_gigabytes)?"
    r"|((mixture\.[\w-]+\.)?teacher|sampling)\.server\."
    r"(url|sequences_per_request|recheck_every|weights|transfer|concurrency|timeout|retries|api_key_env)"
)
# With another one of these it is another run.
FIXED = re.compile(
    r"seed|(student|teacher|reference|data|mixture|environment|eval\.data|eval\.more\.[\w-]+\.data)(\..*)?"
)
KINDS: dict[type, str] = {DistillConfig: "a distill run", SftConfig: "an sft run"}
GONE = "no setting of this version"


class Change(NamedTuple):
    """A setting with its old value and its new one."""

    setting: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} was {self.was!r} and is {self.now!r}"


def check_settings(path: Path, config: RunConfig) -> list[Change]:
    """The changes since the run in a folder went on last, without those that change nothing it computes.

    Raises:
        ConfigError: For a change that makes it another run, and for the others unless `config.resume` allows them.
    """
    before = read_settings(path / "config.yaml")
    _check_kind(path, before, config)
    changes = [change for change in _differences(before, config) if not FREE.fullmatch(change.setting)]
    if not changes:
        return []
    found = f"{path} holds a run with another config: {'; '.join(map(str, changes))}"
    fixed = [change.setting for change in changes if FIXED.fullmatch(change.setting)]
    if fixed:
        raise ConfigError(
            f"{found}. Within a run {', '.join(fixed)} cannot change: choose another run folder, or the old settings to "
            f"resume"
        )
    if config.resume != "change":
        raise ConfigError(
            f"{found}. Give --resume change to go on with the new settings, or the old settings to resume, or choose "
            f"another run folder"
        )
    return changes


def _check_kind(path: Path, before: Mapping[str, Any], config: RunConfig) -> None:
    """Refuses a run of another command: one that has settings of that command, and none of this one."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in (RunConfig, *KINDS)}
    own = {kind: names[kind].difference(*(names[other] for other in names if other != kind)) for kind in KINDS}
    for kind, name in KINDS.items():
        if own[kind] & before.keys() and not own.get(type(config), names[RunConfig]) & before.keys():
            raise ConfigError(
                f"{path} holds {name}, not {KINDS[type(config)]}; choose another run folder (student.path "
                f"{path / 'student'} goes on from the trained student, if it is there)"
            )


def read_settings(file: Path) -> dict[str, Any]:
    """The settings that a run folder's config.yaml holds."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no YAML ({' '.join(str(error).split())}); {_RESTORE}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no settings; {_RESTORE}")
    refuse_renamed(flat(settings), f"{file.parent} holds a run of that version; choose another run folder")
    return settings


_RESTORE = "bring the run's own file back, or choose another run folder"


def settings_text(path: Path, config: RunConfig) -> str:
    """What config.yaml holds: every setting but `OWN`, and as comments what was changed on the way."""
    lines = [
        f"# {row['setting']}: {json.dumps(row['was'])} until step {row['step']}, {json.dumps(row['is'])} after it\n"
        for row in read_changes(path)
    ]
    settings = {name: value for name, value in as_dict(config).items() if name not in OWN}
    return "".join(lines) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def read_changes(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's changes.jsonl: step, setting, was, is."""
    return [row for row in read_jsonl(path / NAME) if {"step", "setting", "was", "is"} <= row.keys()]


def record_changes(path: Path, changes: list[Change], step: int) -> None:
    """Writes down what is changed after a step. What was changed after a later one, which is taken again, counts from here.

    A row that is there already, from a start that was cut short, is not added.
    """
    before = read_changes(path)
    rows = [row | {"step": min(row["step"], step)} for row in before]
    for setting, was, now in changes:
        row = {"step": step, "setting": setting, "was": was, "is": now}
        rows += [] if row in rows else [row]
    if rows != before:
        write_text(path / NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _differences(before: Mapping[str, Any], config: Any, prefix: str = "") -> Iterator[Change]:
    """The settings that differ. One that was not there yet had its default."""
    names = [field.name for field in dataclasses.fields(config)]
    for name in names:
        if prefix or name not in OWN:
            was = before[name] if name in before else _plain(default_of(config, name))
            yield from _changes(f"{prefix}{name}", was, getattr(config, name))
    for name in sorted({*before} - {*names}):
        yield Change(f"{prefix}{name}", before[name], GONE)


def _changes(name: str, was: Any, now: Any) -> Iterator[Change]:
    if isinstance(was, dict) and dataclasses.is_dataclass(now):
        yield from _differences(was, now, f"{name}.")
    elif isinstance(was, dict) and isinstance(now, dict) and any(map(dataclasses.is_dataclass, now.values())):
        for key in sorted({*was, *now}):
            yield from _changes(f"{name}.{key}", was.get(key), now.get(key))
    elif was != _plain(now) and not (name.endswith("path") and _same_path(was, now)):
        yield Change(name, was, _plain(now))


def _same_path(was: Any, now: Any) -> bool:
    """One file or folder by two names; what is in it has a fingerprint."""
    return isinstance(was, str) and isinstance(now, str) and os.path.realpath(was) == os.path.realpath(now)


def _plain(value: Any) -> Any:
    """As config.yaml holds it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value
