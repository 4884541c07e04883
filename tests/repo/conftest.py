"""What loads a recipe's modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
from recipe_cases import RECIPES, Load


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports modules of a recipe as its scripts do, with its folder first on the path."""

    def load(folder: str, *names: str) -> list[ModuleType]:
        monkeypatch.syspath_prepend(str(RECIPES))
        monkeypatch.syspath_prepend(str(RECIPES / folder))
        for name in {path.stem for path in RECIPES.rglob("*.py")}:  # several recipes have a make.py
            monkeypatch.delitem(sys.modules, name, raising=False)
        return [importlib.import_module(name) for name in names]

    return load
