"""Training mode and eval mode: which a forward pass runs in, and what that means for dropout and checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

Dropout = Literal["off", "keep"]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Leaves each module in training or not as it was."""
    training = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def updating(model: nn.Module, dropout: Dropout) -> Iterator[None]:
    """While open, forward passes are those of an update; backward passes belong into it too. Then all is as it was.

    With `dropout` off they compute what eval mode does, whatever it is that training mode would change: modules and
    functions that drop, noise in a router, layers that are skipped. Activations are recomputed even so.
    """
    with modes_kept(model):
        if dropout == "keep":
            model.train()
            yield
            return
        model.eval()
        recomputed = _recomputed(model)
        kept = [(module, module._gradient_checkpointing_func) for module in recomputed]
        for module, function in kept:
            # Transformers recomputes in training mode alone: such a module is in it, but for what it computes.
            module.training, module._gradient_checkpointing_func = True, _in_eval_mode(module, function)
        try:
            yield
        finally:
            for module, function in kept:
                module._gradient_checkpointing_func = function


def _recomputed(model: nn.Module) -> list[Any]:
    """The modules that ask for their `training` whether to recompute: layers, or models that do it for their layers."""
    marked: list[Any] = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    layers = [module for module in marked if isinstance(module, GradientCheckpointingLayer)]
    return layers or marked


def _in_eval_mode(module: nn.Module, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpoint`, with `module` in eval mode while the function runs, the first time and again."""

    def run(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        def evaluated(*given: Any, **named: Any) -> Any:
            module.training = False
            try:
                return function(*given, **named)
            finally:
                module.training = True

        return checkpoint(evaluated, *inputs, **options)

    return run
