"""How an integration puts a function of its own in the place of a package's, wherever the package calls it by name."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import CodeType, ModuleType
from typing import Any, NamedTuple


def put_in_place(package: str, installed: str, known: str, parts: Sequence[Part]) -> ExitStack:
    """Puts the replacements of all parts in place that are not, and returns what undoes it.

    Raises RuntimeError, and changes nothing, if the package is not built as they need. `installed` and `known` name the
    versions in the message.
    """
    try:
        replacements = [replacement for part in parts if (replacement := part.replacement()) is not None]
    except DoesNotFit as error:
        raise RuntimeError(
            f"fastkl.integrations.{package} does not fit {installed}: {error}. Use {known}, or a fastkl that knows this "
            f"version"
        ) from None
    undo = ExitStack()
    for replacement in replacements:
        swap(package, replacement.theirs, replacement)
        undo.callback(swap, package, replacement, replacement.theirs)
    return undo


class Replacement:
    """What stands in the place of a function, or of an autograd function."""

    def __init__(self, theirs: Any, ours: Callable[..., Any]) -> None:
        self.theirs, self.ours = theirs, ours

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What fastkl gives, or the package where that does not know such a call."""
        found = self.ours(*arguments, **named)
        return getattr(self.theirs, "apply", self.theirs)(*arguments, **named) if found is NotImplemented else found

    apply = __call__


class Part(NamedTuple):
    """A function, or an autograd function, that a module of the package calls by name."""

    module: str
    name: str
    ours: Callable[..., Any]  # with the same signature; NotImplemented: left to the package

    def replacement(self) -> Replacement | None:
        """None if one is in place. Raises DoesNotFit."""
        theirs = find(self.module, self.name)
        if isinstance(theirs, Replacement):
            return None
        if hasattr(theirs, "apply"):
            check_same_call(theirs.forward, self.ours, f"{self.name}.apply", ignored=1)  # all but ctx
        else:
            check_same_call(theirs, self.ours, self.name)
        check_is_called(self.module, self.name)
        return Replacement(theirs, self.ours)


class DoesNotFit(RuntimeError):
    """The installed version of a package is not built as the integration needs."""


def find(module: str, name: str) -> Any:
    """A global of a package's module. Raises DoesNotFit where there is none."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DoesNotFit(f"it has no {module} ({error})") from None
    if not hasattr(found, name):
        raise DoesNotFit(f"{module} has no {name}")
    return getattr(found, name)


def check_same_call(theirs: Callable[..., Any], ours: Callable[..., Any], name: str, ignored: int = 0) -> None:
    """Raises DoesNotFit unless both take the same arguments: names, order, defaults. `ignored`: first ones of theirs."""
    found = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()][ignored:]
    known = [(p.name, p.kind, p.default) for p in inspect.signature(ours).parameters.values()]
    if found != known:
        arguments = ", ".join(str(p) for p in list(inspect.signature(theirs).parameters.values())[ignored:])
        raise DoesNotFit(f"{name} takes other arguments than this version of fastkl knows: ({arguments})")


def check_is_called(module: str, name: str) -> None:
    """Raises DoesNotFit if no function of the module mentions one of its globals."""
    found = importlib.import_module(module)
    if not any(name in code.co_names for code in _code(found)):
        raise DoesNotFit(f"nothing in {module} calls {name}")


def swap(package: str, old: Any, new: Any) -> None:
    """Puts `new` wherever a loaded module of the package has `old` as a global, under whatever name it was imported."""
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] != package or not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _code(module: ModuleType) -> Iterator[CodeType]:
    """The code of a module's functions and methods, and of the functions inside them."""
    functions = [value for value in vars(module).values() if inspect.isfunction(value)]
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    functions += [value for kind in classes for value in vars(kind).values() if inspect.isfunction(value)]
    codes = [function.__code__ for function in functions]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        yield code
