"""A value as it stands in YAML, read as what the setting is: `no` is text where text is wanted, and false elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import yaml

from fastkl.trainer.commands.schema import alternatives

NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"
TRUTHS: dict[str, bool] = yaml.SafeLoader.bool_values  # yes, no, on, off, true, false


class Misfit(Exception):
    """A value that is not of the type."""


def read(node: yaml.Node, kind: Any) -> Any:
    """The value of a type: a number, text, a list, one of a few words, or null.

    Raises:
        Misfit: If it is none.
    """
    for one in alternatives(kind):
        try:
            return _read_one(node, one)
        except (Misfit, ValueError, OverflowError):
            continue
    raise Misfit


def fits(node: yaml.Node, kind: Any) -> bool:
    """Whether a value is of the type."""
    try:
        read(node, kind)
    except Misfit:
        return False
    return True


def node_of(text: str, kind: Any) -> yaml.Node:
    """A word of the command line, as the node that it would be in a file; where text is wanted, the word as it is."""
    kinds = alternatives(kind)
    if type(None) in kinds and text.strip().lower() in ("null", "~"):
        return yaml.ScalarNode(NULL, text)
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    as_it_is = str in kinds and not (
        isinstance(node, yaml.SequenceNode) and any(get_origin(one) is list for one in kinds)
    )
    if node is None or as_it_is:
        return yaml.ScalarNode(TEXT, text)
    return node


def as_written(node: yaml.Node) -> str:
    """A value for a message."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.tag == TEXT else str(node.value) or "null"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"


def _read_one(node: yaml.Node, kind: Any) -> Any:
    if kind is Any:
        return yaml.safe_load(yaml.serialize(node))
    if get_origin(kind) is list:
        if not isinstance(node, yaml.SequenceNode):
            raise Misfit
        return [read(entry, get_args(kind)[0]) for entry in node.value]
    if not isinstance(node, yaml.ScalarNode) or (node.tag == NULL) != (kind is type(None)):
        raise Misfit
    if get_origin(kind) is Literal:
        return _choice(node.value, get_args(kind))
    return None if kind is type(None) else READERS[kind](node.value)


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise Misfit
    return TRUTHS[text.lower()]


def _whole(text: str) -> int:
    """1000, 1_000, 1e3 and 1000.0 are all this number."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise Misfit from None
        return int(number)


def _number(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _choice(text: str, choices: tuple[str, ...]) -> str:
    """A word of the few; where YAML 1.1 reads one of them as true or false, so does whoever writes true or false."""
    if text in choices:
        return text
    for choice in choices:
        if text.lower() in TRUTHS and TRUTHS.get(choice) is TRUTHS[text.lower()]:
            return choice
    raise Misfit


READERS: dict[type, Callable[[str], Any]] = {bool: _truth, int: _whole, float: _number, str: str}
