"""Where recipes are, and what loads their modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[3] / "recipes"
Load = Callable[..., list[ModuleType]]  # a folder of recipes and names of modules


def assert_verified(verify: Callable[[str, str], bool], name: str, does: str, does_not: str) -> None:
    """`verify(text, name)` takes one text, whatever white space is around it, and neither the other nor an empty one."""
    assert verify(f" {does}\n", name)
    assert not verify(does_not, name)
    assert not verify("", name)
