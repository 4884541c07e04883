"""Records as what a torch operator takes, and back: lists of tensors, numbers and whole numbers, and one string.

A record is a NamedTuple or a dataclass. Its fields are laid out in their order, by their types, and so are the fields of
the records in it. A whole number before a field that may be None says whether it is there; tensors need no such number. The
layouts are made at import, because torch.compile traces `pack`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from fastkl.kernels.problem import Needs, Problem

Packed = tuple[list[Any], list[float], list[int], str]  # the tensors may be shapes, or functions outside of an operator


class _Field(NamedTuple):
    name: str
    kind: Any  # Tensor, float, int, bool, str or a record
    optional: bool


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and (is_dataclass(kind) or hasattr(kind, "_fields"))


def _field(name: str, hint: Any) -> _Field:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    kind = Tensor if Tensor in kinds else str if get_origin(kinds[0]) is Literal else kinds[0]
    return _Field(name, kind, optional=kind is not hint and kind not in (Tensor, str))


_LAYOUTS: dict[Any, tuple[_Field, ...]] = {}


def _lay_out(record: Any) -> None:
    _LAYOUTS[record] = tuple(_field(name, hint) for name, hint in get_type_hints(record).items())
    for field in _LAYOUTS[record]:
        if _is_record(field.kind):
            _lay_out(field.kind)


_lay_out(Problem)
_lay_out(Needs)


def pack(*records: Any) -> Packed:
    """The fields of the records, one record after the other."""
    tensors: list[Any] = []
    numbers: list[float] = []
    integers: list[int] = []
    words: list[str] = []
    for record in records:
        _pack(record, tensors, numbers, integers, words)
    return tensors, numbers, integers, ",".join(words)


def _pack(record: Any, tensors: list[Any], numbers: list[float], integers: list[int], words: list[str]) -> None:
    for name, kind, optional in _LAYOUTS[type(record)]:
        value = getattr(record, name)
        if optional:
            integers.append(0 if value is None else 1)
            if value is None:
                continue
        if kind is Tensor:
            tensors.append(value)
        elif kind is float:
            numbers.append(float(value))
        elif kind is bool:
            integers.append(1 if value else 0)
        elif kind is int:
            integers.append(value)
        elif kind is str:
            words.append(value)
        else:
            _pack(value, tensors, numbers, integers, words)


def unpack(kinds: tuple[Any, ...], tensors: Any, numbers: list[float], integers: list[int], words: str) -> list[Any]:
    """The records that `pack` was given, of these kinds."""
    parts = iter(tensors), iter(numbers), iter(integers), iter(words.split(","))
    return [_unpack(kind, *parts) for kind in kinds]


def _unpack(
    record: Any, tensors: Iterator[Any], numbers: Iterator[float], integers: Iterator[int], words: Iterator[str]
) -> Any:
    values: list[Any] = []
    for _, kind, optional in _LAYOUTS[record]:
        if optional and next(integers) == 0:
            values.append(None)
        elif kind is Tensor:
            values.append(next(tensors))
        elif kind is float:
            values.append(next(numbers))
        elif kind is bool:
            values.append(next(integers) == 1)
        elif kind is int:
            values.append(next(integers))
        elif kind is str:
            values.append(next(words))
        else:
            values.append(_unpack(kind, tensors, numbers, integers, words))
    return record(*values)
