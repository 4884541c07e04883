"""One call of a model with another head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    own = vars(head).get(place_of_forward(head))
    hooked = bool(head._forward_hooks or model.get_output_embeddings()._forward_hooks)  # type: ignore[operator]
    results: list[T] = []

    def forward(hidden: Tensor) -> Any:
        with forward_replaced(head, own):
            result = function(hidden, head)
        if replace_logits:
            results.append(result)
            return result
        logits = hidden.new_empty(*hidden.shape[:-1], 0)
        if hooked and torch.is_grad_enabled():
            logits, result = _tied(logits, result)
        results.append(result)
        return logits

    with forward_replaced(head, forward):
        yield results


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any] | None) -> Iterator[None]:
    """While open, the module has this forward; None for that of its class."""
    place = place_of_forward(module)
    own = vars(module).get(place)
    _put_forward(module, place, forward)
    try:
        yield
    finally:
        _put_forward(module, place, own)


def place_of_forward(module: nn.Module) -> str:
    """The attribute that another forward takes: under a hook of accelerate (device_map), which brings weights and inputs
    together, and puts back what it found."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _put_forward(module: nn.Module, place: str, forward: Callable[..., Any] | None) -> None:
    # In its __dict__ by name: torch.compile loses count of attributes that are set and deleted again.
    if forward is None:
        del vars(module)[place]
    else:
        vars(module)[place] = forward


def _tied(logits: Tensor, result: T) -> tuple[Tensor, T]:
    """Both the same, but that the gradient of what the function returned passes by the logits on its way.

    FSDP gathers a head's weight again when a gradient reaches the head's output: before the function's own backward pass.
    """
    leaves, structure = tree_flatten(result)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not places:
        return logits, result
    logits, *tensors = _Tie.apply(logits, *(leaves[i] for i in places))
    for i, tensor in zip(places, tensors, strict=True):
        leaves[i] = tensor
    return logits, tree_unflatten(leaves, structure)


class _Tie(torch.autograd.Function):
    """A copy; the outputs are of one node of the graph."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients
