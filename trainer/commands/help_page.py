"""What `--help` shows: the settings that matter first, then group by group. Shell completion reads the same parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from fastkl.trainer.commands.schema import (
    REQUIRED,
    Setting,
    alternatives,
    first_sentence,
    group_of,
    in_words,
    settings_of,
)

# What a command cannot do without; of those that train, and of those that do not.
FIRST_OF_RUN = ("run", "student.path", "teacher.path", "data.path")
FIRST_OF_OTHERS = ("model.path", "data.path", "eval.data.path", "output")
# The groups in the order of their importance; others follow as they are declared.
GROUPS = ("model", "student", "teacher", "data", "optim", "sampling", "loss", "batch", "eval", "checkpoint")
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}  # how shtab completes the name of a file


def add_config_file(parser: argparse.ArgumentParser) -> None:
    action = parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="YAML file with any of the settings.")
    action.complete = FILES  # type: ignore[attr-defined]


def add_settings(parser: argparse.ArgumentParser, config: type) -> None:
    """An option for every setting of a config."""
    found = dict(_flat(config))
    first = [name for name in (FIRST_OF_RUN if "run" in found else FIRST_OF_OTHERS) if name in found]
    _add(parser.add_argument_group("what matters first"), {name: found.pop(name) for name in first})
    top = {name: found.pop(name) for name in list(found) if "." not in name}
    groups = dict(_groups(config))
    for name in sorted(groups, key=_rank):
        title = f"{name}: {first_sentence(groups[name]).rstrip('.')}"
        _add(
            parser.add_argument_group(title),
            {full: setting for full, setting in found.items() if full.rpartition(".")[0] == name},
        )
    _add(parser.add_argument_group("the rest"), top)


def _rank(name: str) -> tuple[int, str]:
    top = name.partition(".")[0]
    return (GROUPS.index(top) if top in GROUPS else len(GROUPS), name)


def _flat(config: type, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for name, setting in settings_of(config).items():
        group = group_of(setting.kind)
        if group is None:
            yield prefix + name, setting
        else:
            yield from _flat(group, f"{prefix}{name}.")


def _groups(config: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    for name, setting in settings_of(config).items():
        group = group_of(setting.kind)
        if group is not None:
            yield prefix + name, group
            yield from _groups(group, f"{prefix}{name}.")


def _add(group: Any, settings: dict[str, Setting]) -> None:
    for name, setting in settings.items():
        group.add_argument(
            f"--{name}",
            metavar=_placeholder(setting.kind),
            choices=_choices(setting.kind),
            help=f"{setting.help} (type: {in_words(setting.kind)}{_default(setting.default)})".replace("%", "%%"),
        )


def _placeholder(kind: Any) -> str:
    """What stands for the value: N for a number, and so on."""
    short = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    one = next(one for one in alternatives(kind) if one is not type(None))
    if get_origin(one) is Literal:
        return "|".join(get_args(one))
    return short.get(one, "LIST" if get_origin(one) is list else "GROUP")


def _choices(kind: Any) -> list[str] | None:
    literals: Iterable[Any] = (one for one in alternatives(kind) if get_origin(one) is Literal)
    words = [word for literal in literals for word in get_args(literal)]
    return words or (["true", "false"] if kind is bool else None)


def _default(value: Any) -> str:
    if value is REQUIRED:
        return ", required"
    spelled = {None: "null", True: "true", False: "false", "": "none"}
    return f", default: {spelled.get(value, value) if isinstance(value, (str, bool, type(None))) else value}"
