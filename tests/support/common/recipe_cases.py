"""Where recipes are, and what loads their modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

RECIPES = Path(__file__).parents[3] / "recipes"
Load = Callable[..., list[ModuleType]]  # a folder of recipes and names of modules
