"""Whether the processes of a group were given the same: what each was given as a few numbers, compared.

What is no tensor, and what tensors are, goes into one number, a hash. Of each tensor there are projections: sums of its
entries with signs that come and go. Where they differ, a second exchange finds out which argument it is, and its values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkl._loss.heads.operands import is_packed, is_sharded
from fastkl.kernels.options import Sparse
from fastkl.kernels.rows.parallel.share import gathered

HIDDEN = ("hidden", "student_hidden", "teacher_hidden")
TARGETS = ("tokens", "targets")
ROWS = ("mask", *TARGETS)  # say which rows count: where one differs, so do others because of it, and it is named
DIRECTIONS = 4
TENSORS = 16  # that numbers are made of; more than any function takes
LENGTH = 1 + TENSORS * (DIRECTIONS + 1)
# How far projections may be apart, of the size that such a sum has. Processes may differ by the rounding of their hidden
# states, which is a fifth of it in bfloat16. Those of other tokens differ by about the whole size, in every direction.
ROUNDING = 0.02
FLOATS = 1e-4
WHOLE = 1e-9  # of whole numbers: sums in another order
SHOWN = 2**20  # entries of a tensor in which the one that differs is looked for


class Compared(NamedTuple):
    """A tensor that all processes are to have alike."""

    rows: Tensor  # [n, d]
    active: Tensor | None  # bool [n]: the rows that count; None: all
    tolerance: float  # of projections


class Statement(NamedTuple):
    """What one process was given, by argument."""

    texts: dict[str, str]
    tensors: dict[str, Compared]
    numbers: list[float]  # LENGTH of them


def stated(function: str, arguments: Mapping[str, Any], own: Collection[str]) -> Statement:
    """Of a call, whatever it was given. Of the arguments `own` the processes have their parts: these have texts alone.

    A synchronisation on an accelerator.
    """
    texts = {"function": function, "grad mode": "on" if torch.is_grad_enabled() else "off"}
    texts |= {name: _text(value, name in own) for name, value in arguments.items() if name != "group"}
    digest = hashlib.blake2b(repr(texts).encode(), digest_size=6).digest()  # a float64 has 53 bits
    ordered = {name: arguments[name] for name in (*ROWS, *arguments) if name in arguments and name not in own}
    plain = {name: value.detach() for name, value in ordered.items() if _is_plain(value)}
    hidden = next((plain[name] for name in HIDDEN if name in plain), torch.empty(0, 0))
    active, lead = _active(plain, arguments.get("ignore_index"), hidden), hidden.shape[:-1]
    tensors = {name: _compared(name, value, lead, active) for name, value in plain.items()}
    sums = [_projections(one).to(hidden.device) for one in tensors.values()]
    numbers = [float(int.from_bytes(digest, "big")), *(torch.cat(sums[:TENSORS]).tolist() if sums else [])]
    return Statement(texts, tensors, numbers + [0.0] * (LENGTH - len(numbers)))


def differing(own: Statement, found: Tensor) -> str | None:
    """The first argument that the processes, of `found` [processes, LENGTH], do not have alike; "" for what is no tensor.

    None if they agree.
    """
    if bool((found[:, 0] != found[0, 0]).any()):
        return ""
    for (name, one), theirs in zip(own.tensors.items(), found[:, 1:].split(DIRECTIONS + 1, 1), strict=False):
        if not bool(torch.isclose(theirs, theirs[0], rtol=0.0, atol=one.tolerance).all()):
            return name
    return None


def difference(own: Statement, name: str, group: dist.ProcessGroup) -> str:
    """What differs, in words: the argument and the values of two processes. A collective of those that differ by `name`."""
    if name:
        return _difference_of_tensors(name, own.tensors[name], group)
    theirs: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, own.texts, group=group)
    for name in dict.fromkeys(name for texts in theirs for name in texts):
        values = [texts.get(name, "not given") for texts in theirs]
        other = next((place for place, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            return f"different {name}: {values[0]} on process 0, {values[other]} on process {other}"
    return "different arguments"  # texts of two hashes cannot be the same


def _difference_of_tensors(name: str, own: Compared, group: dist.ProcessGroup) -> str:
    some = slice(0, max(1, SHOWN // max(1, own.rows.shape[1])))
    entries = _kept(own.rows[some].to(torch.float64), None if own.active is None else own.active[some])
    theirs = gathered(group.group_name, entries.reshape(-1))
    apart = (theirs - theirs[0]).abs()
    if apart.numel() == 0 or not bool((apart > 0).any()):
        return f"different {name}"
    other, place = divmod(int(apart.argmax()), entries.numel())
    first, second = theirs[0, place].item(), theirs[other, place].item()
    return (
        f"different {name}: {first:g} on process 0, {second:g} on process {other}, at {place} of the flattened tensor"
    )


def _text(value: Any, own: bool) -> str:
    """What all processes have alike of an argument; of a part of one, all but how many ids it has."""
    if isinstance(value, Tensor):
        shape = list(value.shape[1:]) if own and value.dim() > 0 else list(value.shape)
        kind = type(value).__name__ if is_sharded(value) or is_packed(value) else value.device.type
        return f"{shape} of {value.dtype} ({kind}){', with a gradient' if value.requires_grad else ''}"
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, Sparse)):
        return repr(value)
    if hasattr(value, "__float__") and getattr(value, "shape", ()) == ():
        number = float(value)
        return repr(int(number)) if number.is_integer() else repr(number)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_text(one, own) for one in value)})"
    return f"a {type(value).__name__}"


def _is_plain(value: Any) -> bool:
    """Is it a tensor whose numbers can be looked at?"""
    if not isinstance(value, Tensor) or is_sharded(value) or is_packed(value):
        return False
    return value.layout == torch.strided and not value.is_meta and not value.is_complex()


def _active(plain: Mapping[str, Tensor], ignored: Any, hidden: Tensor) -> Tensor:
    """bool [N]: neither masked nor ignored, as far as mask and tokens have an entry for each token."""
    active = hidden.new_ones(hidden.shape[:-1], dtype=torch.bool)
    for name, nothing in (("mask", 0), *((name, ignored) for name in TARGETS)):
        given = plain.get(name) if isinstance(nothing, int) else None
        if given is not None and given.shape == active.shape and given.device == active.device:
            active = active & (given != nothing)
    return active.reshape(-1)


def _compared(name: str, tensor: Tensor, lead: torch.Size, active: Tensor) -> Compared:
    """With a row for each token where there is one for each; else with one for each entry."""
    if name in HIDDEN:
        tolerance = ROUNDING
    else:
        tolerance = FLOATS if tensor.is_floating_point() else WHOLE
        tensor = _kept(tensor.to(torch.float64), None)
    if tensor.shape[: len(lead)] != lead:
        return Compared(tensor.reshape(-1, 1), None, tolerance)
    rows = tensor.reshape(lead.numel(), tensor.shape[len(lead) :].numel())
    return Compared(rows, active if name != "mask" and active.device == rows.device else None, tolerance)


def _projections(given: Compared) -> Tensor:
    """[DIRECTIONS + 1] of x [n, d], float64: Σ cos(k i) cos(k j) x_ij over the size of such a sum, and the log of that."""
    rows = given.rows
    with torch.autocast(rows.device.type, enabled=False):
        columns = rows @ _waves(rows.shape[1], rows.device).to(rows.dtype)
    columns = _kept(columns.to(torch.float64), given.active)
    size = torch.linalg.vector_norm(columns).clamp(min=torch.finfo(torch.float32).tiny) / 2
    sums = (columns * _waves(rows.shape[0], rows.device)).sum(0)
    return torch.cat([sums / size, size.log()[None]])


def _waves(count: int, device: torch.device) -> Tensor:
    """cos(k i) [count, DIRECTIONS]."""
    k = torch.arange(1, DIRECTIONS + 1, device=device, dtype=torch.float64)
    return torch.cos(torch.arange(1, count + 1, device=device, dtype=torch.float64)[:, None] * k)


def _kept(rows: Tensor, active: Tensor | None) -> Tensor:
    """With numbers in the place of NaN and infinities, and 0 in rows [n, d] that take no part."""
    rows = torch.nan_to_num(rows, nan=5.0, posinf=7.0, neginf=-7.0)
    return rows if active is None else rows.where(active[:, None], 0.0)
