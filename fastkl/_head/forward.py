"""The forward of a fused model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fastkl._head.call import head_computes, place_of_forward
from fastkl._head.transform import LogitTransform, measure_logit_transform, numeric_settings


class FusedForward:
    """A forward of a model, with the keyword `fused` besides."""

    __slots__ = ("free", "own", "settings", "transform")
    __name__ = "forward"

    def __init__(self, model: nn.Module, own: Callable[..., Any] | None) -> None:
        """`own` is what the model has in place of its class's forward; None for nothing."""
        bound = isinstance(own, MethodType) and own.__self__ is model
        self.own = own.__func__ if bound else own  # type: ignore[union-attr]
        self.free = own is not None and not bound  # its own forward is not called with the model
        self.settings = numeric_settings(model)
        self.transform = measure_logit_transform(model)

    def __call__(self, model: nn.Module, /, *args: Any, fused: Callable[..., Any] | None = None, **inputs: Any) -> Any:
        if fused is None:
            return self.plain(model, *args, **inputs)
        _check(model, fused, inputs)
        if not torch.compiler.is_compiling():
            self._follow_settings(model)

        def computed(hidden: Tensor, head: nn.Linear) -> Any:
            return fused(hidden, head.weight, bias=head.bias, **self.transform._asdict())

        with head_computes(model, computed) as results:
            self.plain(model, *args, **{**inputs, "use_cache": False})
        if len(results) != 1:
            raise RuntimeError(
                f"{type(model).__name__} ran its LM head {len(results)} times in one forward; expected once"
            )
        return results[0]

    def plain(self, model: nn.Module, *args: Any, **inputs: Any) -> Any:
        """The forward without this keyword."""
        if self.own is None:
            return type(model).forward(model, *args, **inputs)
        return self.own(*args, **inputs) if self.free else self.own(model, *args, **inputs)

    def _follow_settings(self, model: nn.Module) -> None:
        """A soft-cap or a scale may have been set since."""
        settings = numeric_settings(model)
        if settings != self.settings:
            self.transform, self.settings = measure_logit_transform(model), settings

    def signature(self, model: nn.Module) -> inspect.Signature:
        """That of the forward without the keyword: callers choose by it which columns of their data a model gets."""
        if self.free:
            return inspect.signature(self.own)  # type: ignore[arg-type]
        return inspect.signature(MethodType(self.own or type(model).forward, model))


class BoundForward:
    """Stands as `forward` in a model: a bound method that can be pickled before its model is whole.

    Those who replace a model's forward in their turn, as accelerate does, find in it what they look for in a bound method.
    """

    __slots__ = ("__func__", "__self__")
    __name__ = "forward"

    def __init__(self, function: FusedForward, model: nn.Module) -> None:
        self.__func__, self.__self__ = function, model

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        return self.__func__(self.__self__, *args, **inputs)

    @property
    def __code__(self) -> CodeType:
        """Of the forward without the keyword, as torch.export asks for it."""
        own: Any = self.__func__.own or type(self.__self__).forward
        code: CodeType = own.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return self.__func__.signature(self.__self__)

    def replicate(self) -> nn.Module:
        """Stands as `_replicate_for_data_parallel` in a model: a copy that `nn.DataParallel` makes has its own forward."""
        model: Any = self.__self__
        replica: nn.Module = type(model)._replicate_for_data_parallel(model)
        for name, value in [*vars(replica).items()]:
            if isinstance(value, BoundForward):
                vars(replica)[name] = BoundForward(self.__func__, replica)
        return replica


def is_fused(model: nn.Module) -> bool:
    """Whether calls of the model's forward reach a fused one, through others that were put around it."""
    forward: Any = getattr(model, place_of_forward(model))
    while forward is not None:
        if isinstance(getattr(forward, "__func__", forward), FusedForward):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _check(model: nn.Module, function: Any, inputs: dict[str, Any]) -> None:
    if not callable(function):
        raise TypeError(
            f"fused is {type(function).__name__}, and takes a function: write model(input_ids=ids, fused=lambda hidden, "
            f"weight, **head: …), where the function returns a loss; for logits call the model without it"
        )
    if inputs.get("labels") is not None:
        raise TypeError(
            "labels and fused exclude each other: with labels a model makes its own loss out of logits; give them to your "
            "function's loss"
        )
    if getattr(model, "_is_replica", False):
        raise TypeError(
            "nn.DataParallel splits a batch: your function would see a part of it beside the whole of its own tensors; "
            "start one process for each GPU (torchrun, accelerate launch), with DistributedDataParallel"
        )
    if not torch.compiler.is_compiling():
        _check_signature(function)


def _check_signature(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in ones have none
        return
    try:
        signature.bind(None, None, bias=None, **dict.fromkeys(LogitTransform._fields))
    except TypeError as error:
        raise TypeError(
            f"fused is called with hidden, weight, bias=, logit_scale= and softcap=, and yours takes {signature} "
            f"({error}): let it take (hidden, weight, **head), and pass **head on to the loss"
        ) from None
