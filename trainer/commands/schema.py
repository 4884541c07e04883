"""What can be set: the names, types and explanations of a config's settings, read off its dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

REQUIRED = dataclasses.MISSING


class Setting(NamedTuple):
    """A field of a config."""

    kind: Any  # its type
    default: Any  # REQUIRED where it has none
    help: str


@cache
def settings_of(config: type) -> dict[str, Setting]:
    """The fields of a config by name, in their order."""
    kinds, helps = get_type_hints(config), _explanations(config)
    return {
        field.name: Setting(
            kinds[field.name],
            field.default if field.default_factory is REQUIRED else field.default_factory(),
            helps[field.name],
        )
        for field in dataclasses.fields(config)
    }


def group_of(kind: Any) -> type | None:
    """The config that a type stands for, `X` or `X | None`; None for any other type."""
    return next((one for one in alternatives(kind) if isinstance(one, type) and dataclasses.is_dataclass(one)), None)


def entry_of(kind: Any) -> Any:
    """X for `dict[str, X]`: groups or values under names of the user's own; None for any other type."""
    return get_args(kind)[1] if get_origin(kind) is dict else None


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def full_names(config: type, prefix: str = "", groups: bool = False) -> Iterator[str]:
    """The full names (`optim.lr`) of all settings; with `groups`, also those of the groups."""
    for name, setting in settings_of(config).items():
        group = group_of(setting.kind)
        if group is None or groups:
            yield prefix + name
        if group is not None:
            yield from full_names(group, f"{prefix}{name}.", groups)


def in_words(kind: Any) -> str:
    """A type as a reader says it: "a number", "one of a, b, c", "text or null"."""
    return " or ".join(_one_in_words(one) for one in alternatives(kind))


def _one_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        several = {str: "texts", int: "whole numbers", float: "numbers"}[get_args(kind)[0]]
        return f"a list of {several}"
    if entry_of(kind) is not None and group_of(entry_of(kind)) is None:
        return "names with values"
    if entry_of(kind) is not None or dataclasses.is_dataclass(kind):
        return "a group of settings"
    return {type(None): "null", bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def first_sentence(config: type) -> str:
    """What a config is, from its docstring."""
    return (inspect.getdoc(config) or "").split("\n\n")[0].replace("\n", " ")


def _explanations(config: type) -> dict[str, str]:
    """The lines under `Args:` of a config's docstring and of those that it extends."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
        for name, help in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, flags=re.MULTILINE):
            found[name] = " ".join(help.split())
    return found
