"""Every Triton kernel in the code."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton.runtime.jit import JITFunction

from fastkl.kernels import launch


def kernels() -> Iterator[Any]:
    """Helpers, which kernels call, have other names."""
    room = Path(launch.__file__).parent
    for file in room.rglob("*.py"):
        if "triton" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(".".join(("fastkl.kernels", *file.relative_to(room).with_suffix("").parts)))
        for name, function in vars(module).items():
            if (
                isinstance(function, JITFunction)
                and function.__module__ == module.__name__
                and name.endswith("_kernel")
            ):
                yield function
