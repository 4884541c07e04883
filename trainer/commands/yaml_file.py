"""A YAML file of settings, as nodes that know their lines."""

from __future__ import annotations

from pathlib import Path

import yaml

from fastkl.trainer.commands.given import Place
from fastkl.trainer.errors import ConfigError


def read_file(path: Path) -> list[tuple[str, yaml.Node, Place]]:
    """The settings at the top of a YAML file.

    Raises:
        ConfigError: If there is no such file, or if it is not a YAML file of settings.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(_no_yaml(path, error)) from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} is no config: it must hold settings, each as `name: value`")
    _merge(loader, node, path, set())
    return [(str(key.value), value, Place(str(path), key.start_mark.line + 1)) for key, value in node.value]


def _merge(loader: yaml.SafeLoader, node: yaml.Node, path: Path, seen: set[int]) -> None:
    """Resolves `<<: *anchor`; refuses a name that stands twice."""
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    own: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: a setting's name must be a word")
        if key.value in own and key.value != "<<":
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} stands here twice; take one out")
        own.add(key.value)
        _merge(loader, value, path, seen)
    loader.flatten_mapping(node)
    # What is merged in comes first, and a later one of the same name replaces it.
    node.value = list({key.value: (key, value) for key, value in node.value}.values())


def _no_yaml(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{path}{line} is not YAML: {problem}; it must hold settings, each as `name: value`"
