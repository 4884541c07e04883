"""The implementations under test: ours, eager PyTorch's and other people's. One file each, imported only when asked for.

A file `<name>.py` is what `--impl <name>` measures; nothing else has to know of it. It is in this folder, or in packages/
if it runs a package of other people's. It holds

    PEER = Peer(build, ops=..., devices=..., ...)

What PEER declares is checked before `build` is called. `build` imports the packages it needs: one that is not installed is
a reason to be skipped. It raises `Unsupported` for whatever else it cannot do.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bench.lib.cases import DTYPES, OPS, Case

Loss = Callable[[], Tensor]  # a call that returns the scalar loss, differentiable in the case's `gradient_inputs`


class Unsupported(Exception):
    """This implementation cannot do this case here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """An implementation and what it can do."""

    build: Callable[[Case], Loss]
    ops: tuple[str, ...] = OPS
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    packages: tuple[str, ...] = ()  # distributions whose versions belong into a report
    backward: str = "exact"  # or how the gradient is estimated
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by op: what it does that the others do not
    solves: Callable[[Case], Case] = lambda case: case  # the problem whose loss it returns, where that is another one


def names() -> list[str]:
    """What `--impl` can name."""
    return sorted(_modules())


def load(name: str) -> Peer:
    return cast(Peer, importlib.import_module(_modules()[name]).PEER)


def _modules() -> dict[str, str]:
    """By name."""
    packages = Path(__file__).with_name("packages")
    found = {module.name: f"{__name__}.packages.{module.name}" for module in pkgutil.iter_modules([str(packages)])}
    return found | {module.name: f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)}


def build(name: str, case: Case) -> Loss:
    """The loss of `case` by the implementation called `name`, or `Unsupported`."""
    peer = load(name)
    for what, asked, possible in (
        ("op", case.op, peer.ops),
        ("device", case.hidden.device.type, peer.devices),
        ("dtype", case.hidden.dtype, peer.dtypes),
    ):
        if asked not in possible:
            raise Unsupported(f"the {what} is {asked}; it can do {', '.join(map(str, possible))}")
    try:
        return peer.build(peer.solves(case))
    except ImportError as error:
        raise Unsupported(f"cannot be imported: {error}") from error
