"""What mkdocstrings is told of fastkl: the rooms without an `__init__.py`, the options of the losses, Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from docstrings import markdown


class Rooms(griffe.Extension):
    """The API as `help()` shows it."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Adds the modules of folders without an `__init__.py`, which griffe takes for no packages."""
        root = Path(str(pkg.filepath)).parent
        shared = {
            "extensions": loader.extensions,
            "lines_collection": loader.lines_collection,
            "modules_collection": loader.modules_collection,
        }
        files = [*root.rglob("*.py"), *(root / "kernels").rglob("*.py")]  # the trainer's link is not followed
        for file in sorted(files):
            *rooms, name = file.relative_to(root).with_suffix("").parts
            parent = pkg
            for room in rooms:
                if room not in parent.members:
                    parent.set_member(room, griffe.Module(room, filepath=[file.parent], parent=parent))
                parent = parent.members[room]
            if name not in parent.members and name != "__init__":
                code = file.read_text(encoding="utf-8")
                parent.set_member(name, griffe.visit(name, file, code, parent=parent, **shared))
        loader.expand_wildcards(pkg)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Options that a TypedDict declares stand in the signature one by one."""
        if "options" not in func.parameters or func.parent is None or not func.parent.is_module:
            return
        real = getattr(importlib.import_module(func.parent.path), func.name)
        del func.parameters["options"]
        for name, parameter in inspect.signature(real).parameters.items():
            if name not in func.parameters:
                annotation = re.sub(r"(\w+\.)+", "", inspect.formatannotation(parameter.annotation))  # of torch.Tensor
                kind, default = griffe.ParameterKind.keyword_only, repr(parameter.default)
                func.parameters.add(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
