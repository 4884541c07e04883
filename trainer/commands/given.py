"""The settings that a user gave, in a YAML file and on the command line, each with the place where it stands."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_origin

import yaml

from fastkl.trainer.commands.schema import REQUIRED, alternatives, entry_of, full_names, group_of, in_words, settings_of
from fastkl.trainer.commands.values import NULL, Misfit, as_written, fits, read
from fastkl.trainer.config.teacher import OWN
from fastkl.trainer.errors import ConfigError

PATHS = (
    "run",
    "path",
    "output",
    "tokenizer",
    "weights",
)  # settings of these names are paths: ~ and $NAME are filled in
ELSEWHERE_NAMED = {  # by other trainers, and here
    "learning_rate": "lr",
    "max_steps": "steps",
    "lr_scheduler_type": "schedule",
    "output_dir": "run",
    "model_name_or_path": "path",
}
USUAL = ("path", "url", "data", "name", "grader", "objective")  # what a group is given first


class Place(NamedTuple):
    """Where a setting stands: a line of a file, or the command line."""

    file: str = ""
    line: int = 0

    def of(self, name: str) -> str:
        """How a message names a setting."""
        return f"{self.file}:{self.line}: {name}" if self.file else f"--{name}"


class Given(NamedTuple):
    """A value and its place."""

    value: Any
    place: Place


class Settings:
    """What is given for a config; later values replace earlier ones.

    Args:
        config: The dataclass that they are for.
        elsewhere: Says of a name that the config lacks where it belongs, or "".
    """

    def __init__(self, config: type, elsewhere: Callable[[str], str] = lambda name: "") -> None:
        self._config, self._elsewhere = config, elsewhere
        self.given: dict[str, Given] = {}

    def add(self, name: str, node: yaml.Node, place: Place) -> None:
        """A setting or a group of them, under its full name."""
        self._enter(name, node, place, self._config, "")

    def kind_of(self, name: str, place: Place) -> Any:
        """The type of the setting with this full name."""
        kind: Any = self._config
        for depth, part in enumerate(parts := name.split(".")):
            kind = self._step(kind, ".".join(parts[:depth]), part, name, place)
        return kind

    def build(self) -> Any:
        """The config."""
        return self._build(self._config, "")

    def _enter(self, key: str, node: yaml.Node, place: Place, kind: Any, group: str) -> None:
        """Takes a value under a key (`lr`, or `optim.lr` as a whole) of a group."""
        part, _, rest = (key, "", "") if entry_of(kind) is not None and place.file else key.partition(".")
        name = f"{group}.{part}" if group else part
        kind = self._step(kind, group, part, f"{name}.{rest}" if rest else name, place)
        if rest:
            self.given.pop(name, None)
            self._enter(rest, node, place, kind, name)
        elif (group_of(kind) or entry_of(kind)) and isinstance(node, yaml.MappingNode):
            self.given.pop(name, None)
            for below, value in node.value:
                self._enter(str(below.value), value, _at(place, below), kind, name)
        else:
            self._take(name, node, place, kind)

    def _step(self, kind: Any, group: str, part: str, name: str, place: Place) -> Any:
        """From a group to the type of what is in it under a name."""
        if entry_of(kind) is not None:
            return entry_of(kind)
        config = group_of(kind)
        if config is None or part not in settings_of(config):
            raise ConfigError(self._unknown(name, place))
        return settings_of(config)[part].kind

    def _take(self, name: str, node: yaml.Node, place: Place, kind: Any) -> None:
        for known in [known for known in self.given if known.startswith(f"{name}.")]:
            del self.given[known]
        group = group_of(kind) or entry_of(kind)
        if group and node.tag == NULL:
            if type(None) in getattr(kind, "__args__", ()):
                self.given[name] = Given(None, place)
            return  # a group without anything in it: all its lines are comments
        if group:
            raise ConfigError(f"{place.of(name)} is {as_written(node)}; {_as_group(name, node, kind)}")
        try:
            value = read(node, kind)
        except Misfit:
            raise ConfigError(f"{place.of(name)} is {as_written(node)}; {_wanted(node, kind)}") from None
        if name.rpartition(".")[2] in PATHS and isinstance(value, str):
            before = f"{OWN}:" if value.startswith(f"{OWN}:") else ""  # of teacher.tokenizer: a path follows
            value = before + expanded(value.removeprefix(before), place.of(name))
        self.given[name] = Given(value, place)

    def _build(self, config: type, group: str) -> Any:
        values = {}
        for part, setting in settings_of(config).items():
            name = f"{group}.{part}" if group else part
            if name in self.given:
                values[part] = self.given[name].value
            elif entry_of(setting.kind) is not None:
                entries = dict.fromkeys(known[len(name) + 1 :].split(".")[0] for known in self._below(name))
                values[part] = {entry: self._entry(entry_of(setting.kind), f"{name}.{entry}") for entry in entries}
            elif self._below(name):
                values[part] = self._build(group_of(setting.kind), name)  # type: ignore[arg-type]
            elif setting.default is REQUIRED:
                raise ConfigError(f"{name} is not set; write {name}: … into the YAML file, or --{name} …")
        try:
            return config(**values)
        except ConfigError as error:
            raise ConfigError(self._located(_with_full_names(str(error), group))) from error

    def _entry(self, kind: Any, name: str) -> Any:
        return self.given[name].value if name in self.given else self._build(kind, name)

    def _below(self, name: str) -> list[str]:
        return [known for known in self.given if known.startswith(f"{name}.")]

    def _located(self, message: str) -> str:
        """A refusal with the line of the first setting that it is about."""
        names = [name for name in re.findall(r"[\w-]+(?:\.[\w-]+)*", message) if name in self.given]
        place = self.given[names[0]].place if names else Place()
        return f"{place.file}:{place.line}: {message}" if place.file else message

    def _unknown(self, name: str, place: Place) -> str:
        """A name that no setting has, and those that may be meant."""
        known = self._known(name)
        last = name.rpartition(".")[2]
        last = ELSEWHERE_NAMED.get(last, last)
        meant = [one for one in known if one.rpartition(".")[2] == last] or difflib.get_close_matches(name, known, 1)
        meant = meant or [one for one in known if difflib.get_close_matches(last, [one.rpartition(".")[2]], 1, 0.75)]
        if elsewhere := self._elsewhere(name):
            hint = elsewhere
        elif meant:
            hint = f"did you mean {' or '.join(meant[:3])}?"
        else:
            hint = "--help lists all settings"
        return f"{place.of(name)} is no setting; {hint}"

    def _known(self, name: str) -> list[str]:
        """The names that may be meant: within an entry with a name of the user's own, those of that entry."""
        first, entry, *rest = [*name.split("."), "", ""]
        setting = settings_of(self._config).get(first)
        group = None if setting is None else group_of(entry_of(setting.kind))
        if rest[0] and group is not None:
            return list(full_names(group, f"{first}.{entry}.", groups=True))
        return list(full_names(self._config, groups=True))


def _at(place: Place, key: yaml.Node) -> Place:
    return place._replace(line=key.start_mark.line + 1) if place.file and key.start_mark else place


def _as_group(name: str, node: yaml.Node, kind: Any) -> str:
    """How the value would be written within its group."""
    if entry_of(kind) is not None:
        of = "a value" if group_of(entry_of(kind)) is None else "a group of settings"
        return f"it takes entries with names of your own, each {of}"
    settings = settings_of(group_of(kind) or type)
    usual = next((one for one in USUAL if one in settings), "")
    if usual and isinstance(node, yaml.ScalarNode):
        value = f"{{path: {node.value}}}" if usual == "data" else node.value
        return f"write {name}: {{{usual}: {value}}}"
    return f"it is a group of settings: {', '.join(settings)}"


def _wanted(node: yaml.Node, kind: Any) -> str:
    words = f"it must be {in_words(kind)}"
    if str in alternatives(kind) and isinstance(node, yaml.MappingNode) and node.flow_style:
        return f"{words}; put a text that begins with a brace into quotes"
    if "a list" in words and isinstance(node, yaml.ScalarNode):
        return f"{words}, for example [{node.value}]"
    for one in alternatives(kind) if isinstance(node, yaml.SequenceNode) else ():
        for number, entry in enumerate(node.value if get_origin(one) is list else (), start=1):
            if not fits(entry, get_args(one)[0]):
                return f"its entry {number} is {as_written(entry)}, and must be {in_words(get_args(one)[0])}"
    return words


def expanded(text: str, name: str) -> str:
    """A path with the home folder and the variables of the environment filled in; `name` is for the refusal."""
    path = os.path.expandvars(os.path.expanduser(text))
    missing = re.search(r"\$(\w+|\{\w+\})", path)
    if missing and missing[0] in text:
        raise ConfigError(f"{name} is {text!r}, but {missing[0]} is not set in the environment")
    return path


def _with_full_names(message: str, group: str) -> str:
    """A group's own refusal says `lora.rank`; the user wrote `student.lora.rank`."""
    last = group.rpartition(".")[2]
    if not last or last == group:
        return message
    return re.sub(rf"(?<![\w.]){re.escape(last)}\.", f"{group}.", message)
