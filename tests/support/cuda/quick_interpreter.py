"""Triton's interpreter without what it does again wherever a kernel calls a function: half of the time of the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

put_in_place = interpreter._patch_lang


@cache
def languages(function: Callable[..., Any]) -> list[ModuleType]:
    """What the function's module knows of the language: kernels have `tl`, Triton's own functions have `tl.core`."""
    known = [value for value in function.__globals__.values() if isinstance(value, ModuleType)]
    return [module for module in (tl, tl.core) if module in known]


def put_in_place_once(function: Callable[..., Any]) -> Any:
    """What stands in for the language stays from the launch to its end: the functions of a kernel find it there."""
    missing = any(tl.core.is_builtin(module.load) for module in languages(function))
    return put_in_place(function) if missing else interpreter._LangPatchScope()


def quicken() -> None:
    interpreter._patch_lang = put_in_place_once
