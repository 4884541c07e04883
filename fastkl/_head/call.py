"""One call of a model with another head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from fastkl._head.model import find_head

T = TypeVar("T")


@contextlib.contextmanager
def head_computes(
    model: nn.Module, function: Callable[[Tensor, nn.Linear], T], *, replace_logits: bool = False
) -> Iterator[list[T]]:
    """While open, the head's forward calls `function(hidden, head)` and collects what it returns.

    The model goes on with empty logits [..., 0], or with the result itself where `replace_logits` is set. While the
    function runs, the head is its own again: the function may run the model.
    """
    head = find_head(model)
    attributes = vars(head)
    own = attributes.get("forward")
    results: list[T] = []

    def forward(hidden: Tensor) -> Any:
        _put_forward(attributes, own)
        try:
            results.append(function(hidden, head))
        finally:
            attributes["forward"] = forward
        return results[-1] if replace_logits else hidden.new_empty(*hidden.shape[:-1], 0)

    attributes["forward"] = forward
    try:
        yield results
    finally:
        _put_forward(attributes, own)


def _put_forward(attributes: dict[str, Any], own: Any) -> None:
    if own is None:
        del attributes["forward"]
    else:
        attributes["forward"] = own
