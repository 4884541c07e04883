"""A sharded student as one model: what sampling, evaluation and saving need."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def name_layers(model: Any) -> None:
    """Leaves the classes of its layers, which FSDP shards as units, to a model: it may name others of its family."""
    has = {type(module).__name__ for module in model.modules()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base._no_split_modules = [name for name in base._no_split_modules or [] if name in has] or None


@contextmanager
def head_gathered_once(model: nn.Module) -> Iterator[None]:
    """While open, FSDP gathers what is in no layer (embeddings, norm, head) once, not twice for each batch.

    These are the outermost unit, which is gathered all through a forward and all through a backward pass in any case: to
    keep it until the next one takes no memory that they do not need. Layers are gathered and let go of one by one, as ever.
    Weights may not change meanwhile.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False, recurse=False)
    model.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        model.reshard()


class GatheredCopy:
    """A plain copy of a model that FSDP shards, with weights only while it is used.

    Sampling runs as many forward passes as it likes, at each process's own pace: none of them may wait for another
    process, as every forward pass of a sharded module does. Between uses the copy has no storage.
    """

    def __init__(self, model: nn.Module) -> None:
        empty: dict[int, object] = {}  # deepcopy takes what it finds here in place of a copy
        for parameter in model.parameters():
            ours = nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad)
            let_go(ours)
            empty[id(parameter)] = ours
        self.model = copy.deepcopy(model, empty).eval()
        self._open = False

    @contextmanager
    def gathered(self, sharded: nn.Module) -> Iterator[None]:
        """With the weights of `sharded`, this model's original; every process takes part."""
        for ours, theirs in self._pairs(sharded):
            gather_into(ours, theirs)
        self._open = True
        try:
            yield
        finally:
            self._open = False
            for parameter in self.model.parameters():
                let_go(parameter)

    def follow(self, sharded: nn.Module) -> None:
        """After an optimizer step: what is trained has its new weights here too, if they are gathered now."""
        for ours, theirs in self._pairs(sharded) if self._open else ():
            if theirs.requires_grad:
                gather_into(ours, theirs)

    def _pairs(self, sharded: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        return zip(self.model.parameters(), sharded.parameters(), strict=True)


@torch.no_grad()
def gather_into(ours: Tensor, theirs: Tensor) -> None:
    """Gives a tensor all of another one, which may be in shards; and memory first, if it has let go of it."""
    ours.untyped_storage().resize_(ours.numel() * ours.element_size())
    ours.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)


def let_go(tensor: Tensor) -> None:
    """Frees the memory of a tensor, which keeps its shape."""
    tensor.untyped_storage().resize_(0)


def own_part(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, or all of one that is not in shards; the same memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def in_shards_as(part: Tensor, like: Tensor) -> Tensor:
    """The processes' parts as one tensor that is in shards as `like` is, on its device; a part alone where that is not."""
    if not isinstance(like, DTensor):
        return part
    mesh, placements = like.device_mesh, like.placements
    local = part.to(like.device)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
