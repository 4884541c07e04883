"""The implementations under test, one module each, imported only when asked for.

A module has `build(case) -> Callable[[], Tensor]`: a call that returns the scalar loss of the case, differentiable in
`case.gradient_inputs`. It raises `Unsupported` with the reason if it cannot do a case. To add one, add its line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from torch import Tensor

from bench.cases import Case

MODULES = {
    "fastkl": "bench.implementations.fused",
    "fastkl-composed": "bench.implementations.composed",
    "eager": "bench.implementations.eager",
    "compile": "bench.implementations.compiled",
    "torch": "bench.implementations.torch_linear",
    "torch-chunked": "bench.implementations.torch_chunked",
}


class Unsupported(Exception):
    """This implementation cannot do this case here; the message says why."""


def build(name: str, case: Case) -> Callable[[], Tensor]:
    """The loss of `case` by the implementation called `name`, or `Unsupported`."""
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        raise Unsupported(f"cannot be imported: {error}") from error
    return cast(Callable[[], Tensor], module.build(case))
