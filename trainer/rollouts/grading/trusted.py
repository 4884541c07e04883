"""Code of the user's own: imported only where the user has said that it is trusted."""

from __future__ import annotations

import importlib
from typing import Any

from fastkl.trainer.errors import ConfigError, brief, require


def imported(option: str, path: str, trust: str, trusted: bool) -> Any:
    """The function or class that a dotted path names; its module is run only where the user has said so."""
    if not trusted:
        raise ConfigError(
            f"{option} names {path!r}, whose module would be run; set {trust} to true if you trust that code"
        )
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{option} names {path!r}, which cannot be imported: {brief(error)}") from error
    require(
        callable(found), f"{option} names {path!r}, a {type(found).__name__}, which cannot be called; name a function"
    )
    return found
